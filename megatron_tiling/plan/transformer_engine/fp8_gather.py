"""The planner's collectives of TransformerEngine, of tensors in FP8 among others (distributed.py)."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.fp8 import Float8BlockQuantizer, QuantizedTensorStorage
from megatron_tiling.plan.transformer_engine.kernels import gathered, reduce_scattered


class _Handle:
    """Of what is under way, which has buffers until it has ended."""

    def __init__(self, *buffers: Tensor) -> None:
        self._buffers = buffers

    def wait(self) -> None:
        self._buffers = ()


def allreduce(tensor: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """The sum, in place, and what to wait for."""
    return tensor, torch.distributed.all_reduce(tensor, group=group, async_op=async_op)


def reduce_scatter_along_first_dim(tensor: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's rows of the sum, and what to wait for, which holds all rows."""
    return reduce_scattered(tensor, group), _Handle(tensor) if async_op else None


def gather_along_first_dim(
    tensor: Any, group: Any, async_op: bool = False, quantizer: Any = None
) -> tuple[Any, _Handle | None]:
    """All ranks' rows, and what to wait for: quantized by parts, in the layouts that ``quantizer`` is set to.

    Makes: what it returns; rows in FP8 of a part in high precision; of blocks another copy of columns, and of scales.
    """
    size = group.size()
    if quantizer is None:
        return gathered(tensor, group), None
    blocks = isinstance(quantizer, Float8BlockQuantizer)
    shape = [tensor.size()[0] * size, *tensor.size()[1:]]
    device = tensor.device if isinstance(tensor, Tensor) else None
    if not isinstance(tensor, QuantizedTensorStorage):
        rows_alone = quantizer.copy()
        if not blocks:
            rows_alone.set_usage(rowwise=True, columnwise=False)
        tensor = rows_alone(tensor)
    if size == 1:
        return tensor, None
    of_total = quantizer.copy()
    of_total.set_usage(rowwise=quantizer.rowwise_usage or not blocks)
    total = of_total.make_empty(shape, device=device)
    buffers = []
    for name in total.parts:
        whole, part = getattr(total, name), getattr(tensor, name)
        if whole is None or part is None or whole.numel() == 1:
            continue  # one scale for all ranks; columns that are made of rows
        if blocks and name in ("_rowwise_scale_inv", "_columnwise_data"):  # whose ranks are side by side
            buffers.append(torch.empty_like(whole))
            whole = buffers[-1]
        torch.distributed.all_gather_into_tensor(whole.view(-1), part.contiguous().view(-1), group=group)
    return total, _Handle(*buffers) if async_op else None

"""Matrix products that write into, or add to, a view of an existing tensor: no copies, no temporaries."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.device import on_gpu


def gemm_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out = a @ b`` or ``out += a @ b``, in place.

    Args:
        out: ``[m, n]``, any row stride, or a batch ``[k, m, n]``, any batch stride; the dtype of ``a`` and ``b``, or
            float32 for narrower operands.
        a, b: ``[m, k]`` and ``[k, n]``, possibly transposed views, or batches of them (stride 0: one for all).
        accumulate: add to what ``out`` holds. ``False`` does not read it.
    """
    if out.dtype != a.dtype and not on_gpu(out):  # the CPU has no product of one dtype into another
        a, b = a.to(out.dtype), b.to(out.dtype)
    batched = out.dim() == 3
    widening: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:  # not addmm_, which torch's FlopCounterMode does not know
        (torch.baddbmm if batched else torch.addmm)(out, a, b, out=out, **widening)
    else:
        (torch.bmm if batched else torch.mm)(a, b, out=out, **widening)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """New memory of the dtype (or another) and on the device of ``like``.

    Of its rows a part becomes an operand of ``gemm_into``.

    On a CPU it is zeroed: there products of bf16 read such rows beyond their end (torch 2.10, 2.14), times zero.
    """
    return like.new_empty(shape, dtype=dtype) if on_gpu(like) else like.new_zeros(shape, dtype=dtype)

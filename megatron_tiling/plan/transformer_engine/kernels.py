"""What the planner's TransformerEngine shares: kernels, collectives, workspaces, gradients of weights."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.tiles.gemm import gemm_into

_CUBLAS_WORKSPACE_BYTES = 32 * 2**20 + 1024  # of Hopper and newer
_GROUPED_STREAMS = 4
_held: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

#: ``(*saved, *gradients of outputs)`` -> gradients of the inputs, in order.
Backward = Callable[..., Sequence[Tensor | None]]
#: ``(*inputs)`` -> outputs, what is kept for the backward pass, and that.
Kernel = Callable[..., tuple[Any, Sequence[Tensor | None], Backward]]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *inputs: Any) -> Any:
        outputs, saved, ctx.gradients = kernel(*inputs)
        CLOCK.touch(inputs, outputs)
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        found = tuple(ctx.gradients(*ctx.saved_tensors, *grad_outputs))
        CLOCK.touch(ctx.saved_tensors, grad_outputs, found)
        return None, *(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad[1:], strict=True))


def run(kernel: Kernel, *inputs: Any) -> Any:
    """A differentiable kernel. ``None``s may be among what it keeps."""
    return _Function.apply(kernel, *inputs)


def held(key: Any, make: Callable[[], Any]) -> Any:
    """What is made once and held for good; once for each simulation."""
    mode = detect_fake_mode()
    of_mode = _held.setdefault(mode if mode is not None else _Function, {})
    if key not in of_mode:
        of_mode[key] = make()
    return of_mode[key]


def workspace(like: Tensor, grouped: bool = False) -> None:
    """Of cuBLAS, beside torch's own (cpp_extensions/gemm.py): 32 MiB; four more for grouped products."""

    def make() -> list[Tensor]:
        count = _GROUPED_STREAMS if grouped else 1
        return [like.new_empty(_CUBLAS_WORKSPACE_BYTES, dtype=torch.uint8) for _ in range(count)]

    held(("workspace", grouped), make)


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """The gradient that autograd gets where the real one went to ``main_grad``: one a shape, held (module/base.py)."""
    dummy: Tensor = held(("wgrad", *shape, dtype), lambda: torch.empty(shape, dtype=dtype, device="cuda"))
    return dummy.detach()


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """All ranks' rows."""
    size = group.size()
    if size == 1:
        return tensor
    whole = tensor.new_empty((tensor.shape[0] * size, *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
    return whole


def reduce_scattered(tensor: Tensor, group: Any) -> Tensor:
    """This rank's rows of the sum."""
    size = group.size()
    if size == 1:
        return tensor
    part = tensor.new_empty((tensor.shape[0] // size, *tensor.shape[1:]))
    torch.distributed.reduce_scatter_tensor(part, tensor.contiguous(), group=group)
    return part


def weight_gradient(weight: Any, grad_output: Tensor, input_: Tensor, fuse: bool, out: Tensor | None = None) -> Any:
    """``grad_output^T input_``: added to ``main_grad`` within the product, or new memory (``out``, if any).

    Args:
        grad_output, input_: ``[T, n]`` and ``[T, k]``.

    Returns:
        What autograd gets.
    """
    if not fuse:
        return torch.mm(grad_output.t(), input_) if out is None else torch.mm(grad_output.t(), input_, out=out)
    gemm_into(weight.main_grad, grad_output.t(), input_, accumulate=True)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype)

"""Whether tensors take the form of a GPU: its kernels, its products, and the memory that both take.

The planner (``plan/``) runs loops on fake tensors of a CPU as a GPU would run them. It has them take that form, in
which wrappers of kernels allocate what they do there and launch nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Where a run is planned: is told what a kernel takes.
_on_launch: Callable[..., None] | None = None


def plan_for_gpu(on_launch: Callable[..., None]) -> None:
    """Tensors are fake and stand for those of a GPU, for the life of this process; kernels go to ``on_launch``."""
    global _on_launch
    _on_launch = on_launch


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU, or stands for one that is."""
    return tensor.is_cuda or _on_launch is not None


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor is on a device and of a dtype that our kernels take."""
    return on_gpu(tensor) and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)


def in_capture() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def blocks(count: int, size: int) -> int:
    """How many blocks of a size cover so many. Triton's own functions, called from Python, take microseconds."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least that is not below ``count``, of at least 1."""
    return 1 << (count - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of ``like``."""
    if _on_launch is not None:
        _on_launch(*args)
        return
    with torch.cuda.device_of(like):
        kernel[grid](*args, **options)

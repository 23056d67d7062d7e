"""Memory that functions of Megatron's which torch.compile makes into kernels hold beside what they take and return.

Most are one kernel, which holds nothing. Seen in Inductor's code of torch 2.11 and in measured peaks.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_SCRATCH = {
    # Adds to some elements of its first argument: of a copy of it, which it writes back.
    ("megatron.core.fusions.fused_cross_entropy", "calculate_gradients"): 0,
}


def scratch(function: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """What ``function`` holds besides, until it returns."""
    index = _SCRATCH.get((function.__module__, function.__qualname__))
    return None if index is None else args[index].new_empty(args[index].shape)

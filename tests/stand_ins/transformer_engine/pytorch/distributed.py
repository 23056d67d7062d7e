"""Megatron's own tracker is what the tests use, and nothing here runs FP8."""

from contextlib import nullcontext
from typing import Any

__all__ = ["CudaRNGStatesTracker", "activation_recompute_forward"]


class CudaRNGStatesTracker: ...


def activation_recompute_forward(activation_recompute: bool, recompute_phase: bool) -> Any:
    return nullcontext()

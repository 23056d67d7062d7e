"""Only imported: Megatron's own tracker is what the tests use, and nothing here runs FP8."""

from contextlib import nullcontext as activation_recompute_forward

__all__ = ["CudaRNGStatesTracker", "activation_recompute_forward"]


class CudaRNGStatesTracker: ...

"""A torch norm that works under sequence parallelism, for runs with neither apex nor TransformerEngine.

Stock Megatron builds its torch norm only when `config.sequence_parallel` is off. Torch's LayerNorm and
RMSNorm compute a sequence shard correctly as they are. All that lacks is the mark on their parameters that
tells Megatron to sum the gradients over the tensor-parallel group, since each rank sees its own tokens only.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

_stock_new: Callable[..., torch.nn.Module] = WrappedTorchNorm.__new__


class SequenceParallelTorchNorm:
    """Drop-in for Megatron's `WrappedTorchNorm`, for model specs: the same torch norm, its parameters marked.

    A class, though it never has instances: Megatron's `build_module` does not call plain functions.
    """

    def __new__(cls, config: Any, hidden_size: int, *args: Any, **kwargs: Any) -> torch.nn.Module:  # type: ignore[misc]
        """Stock's norm, built from a copy of `config` without sequence parallelism; stock's other checks stay."""
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = _stock_new(WrappedTorchNorm, unsharded, hidden_size, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def allow_sequence_parallel() -> None:
    """Make every `WrappedTorchNorm` that Megatron builds from now on a marked one. Idempotent."""
    WrappedTorchNorm.__new__ = SequenceParallelTorchNorm.__new__

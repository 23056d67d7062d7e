"""The tensor-parallel collectives of a column layer, once around all of its tiles; and the shape that tiles see."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ColumnComm:
    """Collectives of a column-parallel layer: at most one of the two kinds.

    Args:
        group: the tensor-parallel group.
        sequence_parallel: the input ``[s/tp, b, h]`` is gathered along its first dimension, in the forward pass and
            again for the weight gradient; the input gradient is reduce-scattered.
        allreduce_dgrad: the input gradient is all-reduced.
        gather_buffer: ``(shape, dtype) -> Tensor`` for the gathered input. It may be shared between layers: it is
            never kept for the backward pass.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool
    allreduce_dgrad: bool
    gather_buffer: Callable[[Sequence[int], torch.dtype], Tensor]

    @property
    def shards(self) -> int:
        """That all tokens are cut into."""
        return self.group.size() if self.sequence_parallel else 1

    def gather(self, shard: Tensor, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
        """``[s/tp, ...]`` -> ``[s, ...]``."""
        shape = (shard.shape[0] * self.group.size(), *shard.shape[1:])
        full = self.gather_buffer(shape, shard.dtype)
        work = dist.all_gather_into_tensor(full, shard.contiguous(), group=self.group, async_op=async_op)
        return full, work

    def reduce(self, dgrad: Tensor, memory: Tensor | None = None) -> tuple[Tensor, dist.Work | None]:
        """Start the reduction of a full input gradient; wait for the returned work before reading the result.

        ``memory`` of the gradient's shape holds this rank's part under sequence parallelism, if it is given.
        """
        if self.sequence_parallel:
            tokens = dgrad.shape[0] // self.group.size()
            shard = dgrad.new_empty(tokens, *dgrad.shape[1:]) if memory is None else memory[:tokens]
            return shard, dist.reduce_scatter_tensor(shard, dgrad, group=self.group, async_op=True)
        if self.allreduce_dgrad:
            return dgrad, dist.all_reduce(dgrad, group=self.group, async_op=True)
        return dgrad, None


def flat(tensor: Tensor) -> Tensor:
    """``[..., features]`` -> ``[tokens, features]``, with one token for 1-D and none for empty tensors."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])

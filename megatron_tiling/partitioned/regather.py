"""Under sequence parallelism a partitioned column layer keeps its shard of the input, and gathers it again backward.

The tiles' autograd functions save their input, which is the gathered one; a hook on saved tensors swaps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def regathered_in_backward(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What runs inside keeps the rank's shard in place of the gathered input, as Megatron's layers do.

    The backward passes of all tiles together gather it once more.

    Args:
        whole: ``[s, ...]``, gathered; recognised by its storage, also in views of it.
        shard: ``[s/tp, ...]``, what it was gathered from.
        group: the tensor-parallel group.
    """
    if whole.numel() == 0:
        yield
        return
    storage = whole.untyped_storage().data_ptr()
    again = _Regathered(shard.detach(), group)

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        again.uses += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else again.take().as_strided(*saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Regathered:
    """An input that is gathered for the first tile that needs it in the backward pass, and dropped after the last."""

    def __init__(self, shard: Tensor, group: dist.ProcessGroup | None) -> None:
        self.shard, self.group = shard.contiguous(), group
        self.version = self.shard._version
        self.uses = self.left = 0
        self.full: Tensor | None = None

    def take(self) -> Tensor:
        """The gathered input.

        Raises:
            RuntimeError: the shard was changed in place meanwhile, as autograd says of a saved tensor.
        """
        if self.shard._version != self.version:
            raise RuntimeError("the input of a partitioned column layer was modified by an inplace operation")
        if self.full is None:
            self.full = self.shard.new_empty(
                self.shard.shape[0] * dist.get_world_size(self.group), *self.shard.shape[1:]
            )
            dist.all_gather_into_tensor(self.full, self.shard, group=self.group)
            self.left = self.uses
        full = self.full
        self.left -= 1
        if self.left == 0:
            self.full = None
        return full

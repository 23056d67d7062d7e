"""Communication of the loops over steps where a run is planned: symmetric memory of its size, and nothing is sent.

What ``symmetric.py`` takes beside torch's allocator is a tensor here, which the planner counts with all others. Copies
by copy engines run behind products and take no time of their own. Depends on torch alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.step_comm import Piece, ScatteredSteps
from megatron_tiling.tiles.symmetric import SOURCES, aligned

#: By the name of a group; of the last plan in this process.
_memories: dict[str, Tensor] = {}


def planned_memory() -> list[Tensor]:
    """All that the workspaces of this process would take."""
    return list(_memories.values())


def forget_planned_memory() -> None:
    """Before another plan in this process."""
    _memories.clear()


class PlannedSteps(ScatteredSteps):
    """One pass over the steps under sequence parallelism, as ``SymmetricSteps`` allocates, on fake tensors."""

    def __init__(self, group: dist.ProcessGroup, sources: Sequence[Tensor], out: Tensor | None) -> None:
        self._going: Tensor | None = None
        self._source_bytes = max((aligned(source.nbytes) for source in sources), default=0)
        arrived = 0 if out is None else aligned(out.nbytes * group.size())
        self._memory = _memory_of(group, SOURCES * self._source_bytes + arrived, (*sources, out))
        super().__init__(group, sources, out)
        for source in self.sources:
            self._area(0, source.shape, source.dtype).copy_(source)

    def _area(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[offset : offset + size].view(dtype).view(*shape)

    def _room_for_pieces(self, out: Tensor) -> Tensor:
        return self._area(SOURCES * self._source_bytes, (self.ranks, *out.shape), out.dtype)

    def _send(self, sums: Tensor, parts: list[tuple[Piece, Tensor]]) -> None:
        self._going = sums  # until the next ones follow them

    def _exchange(self, sends: Any, receives: Any) -> list[dist.Work]:
        return []

    def finish(self) -> None:
        self._going = None
        super().finish()


def _memory_of(group: dist.ProcessGroup, size: int, like: Sequence[Tensor | None]) -> Tensor:
    """A group's, as large as any pass of this plan has wanted it."""
    mode = getattr(next(tensor for tensor in like if tensor is not None), "fake_mode", None)
    known = _memories.get(group.group_name)
    if known is None or known.numel() < size or getattr(known, "fake_mode", None) is not mode:
        _memories.pop(group.group_name, None)
        del known
        _memories[group.group_name] = torch.empty(size, dtype=torch.uint8)
    return _memories[group.group_name]

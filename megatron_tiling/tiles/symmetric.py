"""Steps whose bytes are moved by the copy engines of GPUs, between memory that all ranks of a group see.

torch's symmetric memory: peer-to-peer over NVLink, no multicast, and no kernel but barriers of one block. What runs on
the side streams are copies alone, so they wait for no multiprocessor. All products, additions and barriers are on the
stream that calls, in the same order on every rank: it holds with ``CUDA_DEVICE_MAX_CONNECTIONS=1`` too, where
whatever is enqueued may wait for all that was enqueued before it.

A workspace is the group's own, one for all layers: two sources that peers pull from, and two slots that they push
into. Why nothing is overwritten too early, without a barrier for each copy:

* A pass begins with a barrier after its sources are in place, and its last barrier comes after all of its pulls.
* Step ``c`` is pushed into slot ``c % 2`` after the barrier of step ``c - 1``, which every peer reaches after it has
  added up step ``c - 2``.

Depends on torch alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.log import log_on_rank_0
from megatron_tiling.tiles.step_comm import ScatteredSteps

SOURCES, SLOTS = 2, 2
ALIGNMENT = 512  # bytes
TIMEOUT_MS = 30 * 60_000
"""After which a barrier whose peers do not come ends the process."""


@dataclass
class Workspace:
    """Symmetric memory of one group: ``SOURCES`` areas of one size, then ``SLOTS`` areas of another."""

    handle: Any
    memory: Tensor
    source_bytes: int
    slot_bytes: int
    pulls: torch.cuda.Stream = field(default_factory=lambda: torch.cuda.Stream(priority=-1))
    pushes: torch.cuda.Stream = field(default_factory=lambda: torch.cuda.Stream(priority=-1))
    last_pass: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def source(self, rank: int, index: int, like: Tensor) -> Tensor:
        """A rank's area for a source."""
        return self._area(rank, index * self.source_bytes, like.shape, like.dtype)

    def slot(self, rank: int, step: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A rank's area for the partial sums of a step."""
        return self._area(rank, SOURCES * self.source_bytes + step % SLOTS * self.slot_bytes, shape, dtype)

    def _area(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        area: Tensor = self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return area

    def barrier(self) -> None:
        """On the current stream: what it does next, it does after all ranks have come here."""
        self.handle.barrier(channel=0, timeout_ms=TIMEOUT_MS)

    def signatures(self) -> list[int]:
        """Each rank's number, from 1 on, as it stands in that rank's memory; all ranks together."""
        self.memory[:1].fill_(self.handle.rank + 1)
        self.barrier()
        found: list[int] = torch.cat(
            [self._area(rank, 0, (1,), torch.uint8).clone() for rank in range(self.handle.world_size)]
        ).tolist()
        self.barrier()
        return found


#: By group and device; ``None`` where there is no symmetric memory.
_workspaces: dict[tuple[str, int], Workspace | None] = {}


def workspace_for(group: dist.ProcessGroup, sources: Sequence[Tensor], step_bytes: int) -> Workspace | None:
    """The group's workspace, made or made larger if need be, which all of its ranks do together.

    Returns:
        ``None`` where GPUs do not see each other's memory. It says so once.
    """
    device = sources[0].device
    key = group.group_name, device.index
    known = _workspaces.get(key)
    if key in _workspaces and known is None:
        return None
    source_bytes = max(_aligned(source.nbytes) for source in sources)
    slot_bytes = _aligned(step_bytes)
    if known is not None:
        if source_bytes <= known.source_bytes and slot_bytes <= known.slot_bytes:
            return known
        source_bytes, slot_bytes = max(source_bytes, known.source_bytes), max(slot_bytes, known.slot_bytes)
        torch.cuda.synchronize(device)  # after the last barrier of the last pass, nobody uses the one that goes
        del known, _workspaces[key]
    workspace, reason = None, ""
    try:
        workspace = _new(group, device, source_bytes, slot_bytes)
    except Exception as error:  # of the driver, of torch, of the machine: without it, collectives do the work
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if not _on_all_ranks(workspace is not None, group, device):
        workspace, reason = None, reason or "another rank has none"
    elif workspace is not None:
        found = workspace.signatures()
        right = found == list(range(1, group.size() + 1))
        if not _on_all_ranks(right, group, device):
            workspace, reason = None, f"peers wrote {found} into theirs"
    if workspace is None:
        log_on_rank_0(f"--tiled-tp-overlap: no symmetric memory, collectives move the bytes instead ({reason})")
    _workspaces[key] = workspace
    return workspace


def _on_all_ranks(here: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    everywhere = torch.tensor([here], dtype=torch.int32, device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=group)
    return bool(everywhere.item())


def symmetric_bytes() -> int:
    """What the workspaces of this process take."""
    return sum(workspace.memory.nbytes for workspace in _workspaces.values() if workspace is not None)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _new(group: dist.ProcessGroup, device: torch.device, source_bytes: int, slot_bytes: int) -> Workspace:
    """Raises whatever torch raises where there is none."""
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed._symmetric_memory import rendezvous

    size = SOURCES * source_bytes + SLOTS * slot_bytes
    memory = _SymmetricMemory.empty_strided_p2p((size,), [1], torch.uint8, device, group.group_name)
    return Workspace(rendezvous(memory, group.group_name), memory, source_bytes, slot_bytes)


class SymmetricSteps(ScatteredSteps):
    """One pass over the steps under sequence parallelism, by copy engines; this module says how it keeps order."""

    def __init__(
        self, group: dist.ProcessGroup, sources: Sequence[Tensor], workspace: Workspace, step_bytes: int
    ) -> None:
        super().__init__(group, sources)
        self._workspace, self._rank, self._step = workspace, group.rank(), 0
        ranks = [(self._rank + shift) % self.pieces for shift in range(1, self.pieces)]
        self._peers = ranks  # each rank begins with another one: one stream to and from each GPU at a time
        self._main = torch.cuda.current_stream()
        self._main.wait_event(workspace.last_pass)  # of another stream, if this is not its
        self._shards = []
        for index, source in enumerate(self.sources):
            workspace.source(self._rank, index, source).copy_(source)
            self._shards.append({peer: workspace.source(peer, index, source) for peer in ranks})
        workspace.barrier()
        self._pulling: list[torch.cuda.Event] = []
        self._read_since_barrier = False  # of peers' sources

    def fetch(self, source: int, rows: slice, into: Tensor) -> Callable[[], object]:
        own = self.sources[source][rows]
        gathered = into.view(self.pieces, *own.shape)
        self._workspace.pulls.wait_event(self._main.record_event())  # ``into`` is free
        with torch.cuda.stream(self._workspace.pulls):
            for peer in self._peers:
                gathered[peer].copy_(self._shards[source][peer][rows])
        arrived = self._workspace.pulls.record_event()
        gathered[self._rank].copy_(own)
        self._pulling.append(arrived)
        self._read_since_barrier = True

        def wait() -> None:
            self._main.wait_event(arrived)
            self._pulling.remove(arrived)

        return wait

    def _settle(self, pushed: Any) -> None:
        if pushed is not None:
            self._main.wait_event(self._sent)
            self._barrier()

    def _barrier(self) -> None:
        self._workspace.barrier()
        self._read_since_barrier = bool(self._pulling)

    def _send(self, partial: Tensor, out: Tensor) -> Callable[[], Tensor]:
        shape = (self.pieces, *out.shape)
        slots = [self._workspace.slot(rank, self._step, shape, out.dtype) for rank in range(self.pieces)]
        pieces, pushes = partial.view(shape), self._workspace.pushes
        pushes.wait_event(self._main.record_event())  # the partial sums are there
        with torch.cuda.stream(pushes):
            for peer in self._peers:
                slots[peer][self._rank].copy_(pieces[peer])
        self._sent = pushes.record_event()
        self._step += 1

        def arrived() -> Tensor:
            slots[self._rank][self._rank].copy_(pieces[self._rank])
            return slots[self._rank]

        return arrived

    def finish(self) -> None:
        super().finish()
        for pulled in self._pulling:  # of sources that nobody has read after all
            self._main.wait_event(pulled)
        self._pulling = []
        if self._read_since_barrier:
            self._barrier()
        self._workspace.last_pass.record(self._main)

"""Steps whose bytes are moved by the copy engines of GPUs, between memory that all ranks of a group see.

torch's symmetric memory: peer-to-peer over NVLink, no multicast, and no kernel but barriers of one block. What runs on
the side streams are copies alone, so they wait for no multiprocessor. All products, additions and barriers are on the
stream that calls, in the same order on every rank: it holds with ``CUDA_DEVICE_MAX_CONNECTIONS=1`` too, where
whatever is enqueued may wait for all that was enqueued before it.

A workspace is the group's own, one for all layers: two sources that peers pull from, and an area for each rank
that pushes. Nothing is overwritten too early: a pass begins with a barrier, once its sources are in place, and ends
with one, once its pulls and pushes are done. Between that and the next pass's first barrier a rank adds up what has
arrived, and only after that one do peers push again.

Depends on torch alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.log import log_on_rank_0
from megatron_tiling.tiles.step_comm import Piece, ScatteredSteps, Wait

SOURCES = 2
ALIGNMENT = 512  # bytes


@dataclass
class Workspace:
    """Symmetric memory of one group: ``SOURCES`` areas of one size, then one for what arrives from all ranks.

    A barrier whose peers do not come in ``timeout_ms`` ends the process.
    """

    handle: Any
    memory: Tensor
    source_bytes: int
    arrived_bytes: int
    timeout_ms: int
    pulls: torch.cuda.Stream = field(default_factory=lambda: torch.cuda.Stream(priority=-1))
    pushes: torch.cuda.Stream = field(default_factory=lambda: torch.cuda.Stream(priority=-1))
    last_pass: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def source(self, rank: int, index: int, like: Tensor) -> Tensor:
        """A rank's area for a source."""
        return self._area(rank, index * self.source_bytes, like.shape, like.dtype)

    def arrived(self, rank: int, ranks: int, like: Tensor) -> Tensor:
        """``[tp, ...]`` in a rank's memory: what each rank has pushed to it, shaped as ``like``."""
        return self._area(rank, SOURCES * self.source_bytes, (ranks, *like.shape), like.dtype)

    def _area(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        area: Tensor = self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return area

    def barrier(self) -> None:
        """On the current stream: what it does next, it does after all ranks have come here."""
        self.handle.barrier(channel=0, timeout_ms=self.timeout_ms)

    def signatures(self) -> list[int]:
        """Each rank's number, from 1 on, as it stands in that rank's memory; all ranks together."""
        self.memory[:1].fill_(self.handle.rank + 1)
        self.barrier()
        found: list[int] = torch.cat(
            [self._area(rank, 0, (1,), torch.uint8).clone() for rank in range(self.handle.world_size)]
        ).tolist()
        self.barrier()
        return found


#: By the name of a group and a device: that group and its workspace, ``None`` where there is no symmetric memory.
_workspaces: dict[tuple[str, int], tuple[dist.ProcessGroup, Workspace | None]] = {}


def workspace_for(group: dist.ProcessGroup, sources: Sequence[Tensor], out: Tensor | None) -> Workspace | None:
    """The group's workspace, made or made larger if need be, which all of its ranks do together.

    Returns:
        ``None`` where GPUs do not see each other's memory. It says so once.
    """
    device = next(tensor for tensor in (*sources, out) if tensor is not None).device
    key = group.group_name, device.index
    named_so, known = _workspaces.pop(key, (None, None))
    source_bytes = max((aligned(source.nbytes) for source in sources), default=0)
    arrived_bytes = 0 if out is None else aligned(out.nbytes * group.size())
    if named_so is group:
        if known is None or (source_bytes <= known.source_bytes and arrived_bytes <= known.arrived_bytes):
            _workspaces[key] = group, known
            return known
        source_bytes = max(source_bytes, known.source_bytes)
        arrived_bytes = max(arrived_bytes, known.arrived_bytes)
        torch.cuda.synchronize(device)  # after the last barrier of the last pass, nobody uses the one that goes
    del known

    def allocate() -> Tensor:
        if named_so is not None and named_so is not group:  # torch has the ranks of that one
            raise RuntimeError("a process group of the same name was destroyed")
        return _memory(group, device, SOURCES * source_bytes + arrived_bytes)

    def share(memory: Tensor) -> Workspace:
        return Workspace(_handle(memory, group), memory, source_bytes, arrived_bytes, _timeout_ms(group, device))

    workspace = None
    memory, reason = _if_on_all_ranks(allocate, group, device)
    if memory is not None:  # else some would wait for others in ``share``
        workspace, reason = _if_on_all_ranks(partial(share, memory), group, device)
    if workspace is not None:
        found = workspace.signatures()
        right = found == list(range(1, group.size() + 1))
        if not _on_all_ranks(right, group, device):
            workspace, reason = None, f"peers wrote {found} into theirs"
    if workspace is None:
        log_on_rank_0(f"--tiled-tp-overlap: no symmetric memory, collectives move the bytes instead ({reason})")
    _workspaces[key] = group, workspace
    return workspace


def _if_on_all_ranks[T](work: Callable[[], T], group: dist.ProcessGroup, device: torch.device) -> tuple[T | None, str]:
    """What ``work`` returns, if it does on all ranks; else ``None`` and why not."""
    result, reason = None, "another rank has none"
    try:
        result = work()
    except Exception as error:  # of the driver, of torch, of the machine: without it, collectives do the work
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return (result, "") if _on_all_ranks(result is not None, group, device) else (None, reason)


def _on_all_ranks(here: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    everywhere = torch.tensor([here], dtype=torch.int32, device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=group)
    return bool(everywhere.item())


def symmetric_bytes() -> int:
    """What the workspaces of this process take."""
    return sum(workspace.memory.nbytes for _, workspace in _workspaces.values() if workspace is not None)


def aligned(size: int) -> int:
    """Bytes of an area of the workspace."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _memory(group: dist.ProcessGroup, device: torch.device, size: int) -> Tensor:
    """Raises whatever torch raises where there is none."""
    from torch._C._distributed_c10d import _SymmetricMemory

    def allocate() -> Tensor:
        memory: Tensor = _SymmetricMemory.empty_strided_p2p((size,), [1], torch.uint8, device, group.group_name)
        return memory

    try:
        return allocate()
    except RuntimeError:
        torch.cuda.empty_cache()  # what torch's own allocator holds and does not use is not there for this one
        return allocate()


def _handle(memory: Tensor, group: dist.ProcessGroup) -> Any:
    from torch.distributed._symmetric_memory import rendezvous

    handle = rendezvous(memory, group.group_name)
    if handle is None:
        raise RuntimeError("torch gives no handle for it")
    return handle


def _timeout_ms(group: dist.ProcessGroup, device: torch.device) -> int:
    """That of the group's collectives; torch's default where a backend does not say."""
    options = getattr(group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)
    return timeout // timedelta(milliseconds=1)


class SymmetricSteps(ScatteredSteps):
    """One pass over the steps under sequence parallelism, by copy engines; this module says how it keeps order."""

    def __init__(
        self, group: dist.ProcessGroup, sources: Sequence[Tensor], out: Tensor | None, workspace: Workspace
    ) -> None:
        self._workspace = workspace
        super().__init__(group, sources, out)
        self._main = torch.cuda.current_stream()
        self._main.wait_event(workspace.last_pass)  # of another stream, if this is not its
        self._going: list[tuple[torch.cuda.Event, Tensor]] = []
        self._pulled = workspace.last_pass
        self._shards, self._areas = [], {}
        peers = [self.peer(ahead) for ahead in range(1, self.ranks)]
        for index, source in enumerate(self.sources):
            workspace.source(self.rank, index, source).copy_(source)
            self._shards.append({peer: workspace.source(peer, index, source) for peer in peers})
        if out is not None:
            self._areas = {peer: workspace.arrived(peer, self.ranks, out)[self.rank] for peer in peers}
        workspace.barrier()

    def _room_for_pieces(self, out: Tensor) -> Tensor:
        return self._workspace.arrived(self._workspace.handle.rank, self._workspace.handle.world_size, out)

    def _pull(self, source: int, parts: list[tuple[Piece, Tensor]]) -> Wait:
        pulls = self._workspace.pulls
        pulls.wait_event(self._main.record_event())  # the parts are free
        with torch.cuda.stream(pulls):
            for piece, part in parts:
                part.copy_(self._shards[source][self.peer(piece.ahead)][piece.rows])
        self._pulled = pulls.record_event()  # the last one, for ``finish``
        return partial(self._main.wait_event, self._pulled)

    def _send(self, sums: Tensor, parts: list[tuple[Piece, Tensor]]) -> None:
        self._let_go()
        pushes = self._workspace.pushes
        pushes.wait_event(self._main.record_event())  # the partial sums are there
        with torch.cuda.stream(pushes):
            for piece, part in parts:
                self._areas[self.peer(piece.ahead)][piece.rows].copy_(part)
        self._going.append((pushes.record_event(), sums))

    def _let_go(self) -> None:
        """Of the partial sums before, which have gone behind the products since."""
        for gone, _ in self._going:
            self._main.wait_event(gone)
        self._going = []

    def finish(self) -> None:
        self._let_go()
        self._main.wait_event(self._pulled)
        self._workspace.barrier()
        super().finish()
        self._workspace.last_pass.record(self._main)

    def abandon(self) -> None:
        """The stream that calls goes on behind the copies that were started: what they use may be let go now."""
        self._main.wait_stream(self._workspace.pulls)
        self._main.wait_stream(self._workspace.pushes)
        self._workspace.last_pass.record(self._main)

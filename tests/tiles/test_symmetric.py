"""Steps over symmetric memory: what is pulled, pushed and added up, and when. Ranks are threads, copies are at once."""

import contextlib
import random
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles import step_comm, symmetric
from megatron_tiling.tiles.step_comm import cut
from megatron_tiling.tiles.symmetric import SOURCES, SymmetricSteps, Workspace, workspace_for

ROWS, BATCH, HIDDEN, OUT = 10, 2, 4, 6
#: Sources of each pass; the second pushes nothing, and the third, which fetches nothing, only pushes.
PASSES, FETCHES = (1, 2, 0, 2), 1


class Stream:
    """Everything on it has run already."""

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> object:
        return object()

    def record(self, stream: object) -> None:
        pass


class Handle:
    """A rank's view of the memory of all ranks; barriers come and go late."""

    def __init__(self, rank: int, memories: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(memories)
        self.memories, self._barrier, self._late = memories, barrier, random.Random(rank)

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        count = torch.Size(shape).numel()
        return self.memories[rank].view(dtype)[offset : offset + count].view(shape)

    def barrier(self, channel: int, timeout_ms: int) -> None:
        for _ in range(2):
            time.sleep(self._late.random() * 0.002)
        self._barrier.wait(30)
        time.sleep(self._late.random() * 0.002)


def value(kind: int, index: int, rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * kind + 10 * index + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one_rank(rank: int, ranks: int, workspace: Workspace, steps: int, errors: list[str]) -> None:
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
    late = random.Random(-rank)
    for index, count in enumerate(PASSES):
        sources = [value(kind, index, rank, ROWS, BATCH, HIDDEN) for kind in range(count)]
        out = None if index == FETCHES else torch.full((ROWS, BATCH, OUT), torch.nan, dtype=torch.float64)
        comm = SymmetricSteps(group, sources, out, workspace)
        for number, step in enumerate(cut(ROWS, BATCH, ranks, steps)):
            for source in range(len(sources)):
                time.sleep(late.random() * 0.002)
                found, ready = comm.fetch(source, step)
                ready()
                held = [
                    value(source, index, (rank + piece.ahead) % ranks, ROWS, BATCH, HIDDEN)[piece.rows]
                    for piece in step.pieces
                ]
                if not torch.equal(found, torch.cat(held).flatten(0, 1)):
                    errors.append(f"rank {rank}, pass {index}, step {number}: source {source} is not what peers hold")
            if out is not None:
                sums = comm.partial(step)
                every = value(2, index, rank, ranks, ROWS, BATCH, OUT)
                pieces = [every[(rank + piece.ahead) % ranks][piece.rows] for piece in step.pieces]
                sums.copy_(torch.cat(pieces).flatten(0, 1))
                comm.push(sums, step)
        for source in range(len(sources)):
            whole = torch.full((ranks * ROWS * BATCH, HIDDEN), torch.nan, dtype=torch.float64)
            for ready in [comm.fetch_to_place(source, step, whole) for step in cut(ROWS, BATCH, ranks, steps)]:
                ready()
            every_rank = [value(source, index, peer, ROWS, BATCH, HIDDEN) for peer in range(ranks)]
            if not torch.equal(whole, torch.cat(every_rank).flatten(0, 1)):
                errors.append(f"rank {rank}, pass {index}: source {source} is out of order")
        comm.finish()
        if out is not None:
            pieces = [value(2, index, peer, ranks, ROWS, BATCH, OUT)[rank] for peer in range(ranks)]
            if not torch.equal(out, torch.stack(pieces).sum(0)):
                errors.append(f"rank {rank}, pass {index}: not the sum of what ranks pushed")


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_peers_get_what_ranks_hold_and_push(ranks: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stub in {"current_stream": Stream, "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(symmetric.torch.cuda, name, stub)
    monkeypatch.setattr(step_comm, "TOKEN_MULTIPLE", 1)
    size = ROWS * BATCH * OUT * 8 * ranks
    memories = [torch.zeros((SOURCES + 1) * size, dtype=torch.uint8) for _ in range(ranks)]
    barrier, errors = threading.Barrier(ranks), []
    stream: Any = Stream()
    threads, done = [], []

    def run(rank: int, workspace: Workspace) -> None:
        one_rank(rank, ranks, workspace, steps, errors)
        done.append(rank)

    for rank in range(ranks):
        handle = Handle(rank, memories, barrier)
        workspace = Workspace(handle, memories[rank], size, size, 0, stream, stream, stream)
        threads.append(threading.Thread(target=run, args=(rank, workspace)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert len(done) == ranks, f"only ranks {done} came to their end"


def test_after_an_error_the_copies_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read and write is let go: whoever gets that memory must come after them."""
    main: Any = SimpleNamespace(waited=[], wait_event=lambda event: None)
    main.wait_stream = main.waited.append
    monkeypatch.setattr(symmetric.torch.cuda, "current_stream", lambda: main)
    memory = torch.zeros(4096, dtype=torch.uint8)
    handle = Handle(0, [memory, memory], threading.Barrier(1))
    pulls: Any = Stream()
    pushes: Any = Stream()
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    workspace = Workspace(handle, memory, 512, 512, 0, pulls, pushes, pulls)
    with pytest.raises(MemoryError), SymmetricSteps(group, [torch.zeros(4, 2)], torch.zeros(4, 2), workspace):
        raise MemoryError
    assert main.waited == [pulls, pushes]


class Allocator:
    """torch's, of symmetric memory; ``fails`` so many times."""

    def __init__(self, fails: int = 0) -> None:
        self.fails = fails

    def empty_strided_p2p(self, size: tuple[int, ...], *more: object) -> Tensor:
        self.fails -= 1
        if self.fails >= 0:
            raise RuntimeError("CUDA driver error: out of memory")
        return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of groups whose ranks share memory; this process is all ranks, and the memory a CPU's."""
    found: list[str] = []

    def share(memory: Tensor, name: str) -> Any:
        found.append(name)
        return SimpleNamespace(rank=0, world_size=1, barrier=lambda **_: None, get_buffer=lambda *_: memory[:1])

    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", share)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Allocator())
    monkeypatch.setattr(symmetric, "_workspaces", {})
    monkeypatch.setattr(symmetric, "_on_all_ranks", lambda here, group, device: here)
    for name in ("Stream", "Event"):
        monkeypatch.setattr(symmetric.torch.cuda, name, lambda **_: Stream())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(symmetric.torch.cuda, name, lambda *_: None)
    return found


def group_called(name: str) -> Any:
    backend = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(minutes=7)))
    return SimpleNamespace(group_name=name, size=lambda: 1, _get_backend=lambda device: backend)


def test_a_workspace_is_the_groups_and_grows(rendezvous: list[str]) -> None:
    group, small, large = group_called("1"), [torch.zeros(8)], [torch.zeros(4000)]
    first = workspace_for(group, small, None)
    assert first is not None and workspace_for(group, small, None) is first
    second = workspace_for(group, large, small[0])
    assert second is not None and second is not first and workspace_for(group, small, small[0]) is second
    assert rendezvous == ["1", "1"]
    assert first.timeout_ms == 7 * 60_000  # as of the group's collectives


def test_a_rank_without_memory_keeps_none_waiting(rendezvous: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another rank has none, this one does not wait for it to share."""
    monkeypatch.setattr(symmetric, "_on_all_ranks", lambda here, group, device: False)
    assert workspace_for(group_called("1"), [torch.zeros(8)], None) is None
    assert rendezvous == []


def test_memory_that_torch_holds_and_does_not_use(rendezvous: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Allocator(fails=1))
    assert workspace_for(group_called("1"), [torch.zeros(8)], None) is not None
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Allocator(fails=2))
    assert workspace_for(group_called("2"), [torch.zeros(8)], None) is None


def test_another_group_of_the_same_name(rendezvous: list[str]) -> None:
    """torch begins to count anew when all groups are destroyed, and remembers who was in them."""
    group, source = group_called("1"), [torch.zeros(8)]
    for _ in range(2):
        assert workspace_for(group, source, None) is not None
    for _ in range(2):
        assert workspace_for(group_called("1"), source, None) is None
    assert rendezvous == ["1"]

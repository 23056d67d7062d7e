"""Steps over symmetric memory: what is pulled, pushed and added up, and when. Ranks are threads, copies are at once."""

import contextlib
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles import step_comm, symmetric
from megatron_tiling.tiles.step_comm import cut
from megatron_tiling.tiles.symmetric import SOURCES, SymmetricSteps, Workspace

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
        workspace = Workspace(handle, memories[rank], size, size, stream, stream, stream)
        threads.append(threading.Thread(target=run, args=(rank, workspace)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert len(done) == ranks, f"only ranks {done} came to their end"

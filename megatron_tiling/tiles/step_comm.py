"""Tensor-parallel communication of a loop that goes by steps of tokens, each step's behind the products of others.

A pass over the loop (forward or backward) fetches what the ranks hold of a step's tokens, and pushes its partial sums
to the ranks that they belong to. Under sequence parallelism a step takes rows ``c`` of every rank's shard
``[s/tp, ..., h]``: fetched it is ``[tp, m, ..., h]``, and each rank gets the sum of its own rows back. Partial sums
arrive as they are, and are added in float32 in the order of the ranks: the same numbers however bytes move.

Bytes move by the copy engines of GPUs that see each other's memory (``symmetric.py``), else by collectives. Depends on
torch alone.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.comm import flat

#: ``auto``: symmetric memory where it is there, else collectives beside the products. ``blocking``: one after another.
Transport = Literal["auto", "collectives", "blocking"]
#: A step of fewer tokens costs more in small products and launches than it hides. Not measured yet.
LEAST_STEP_TOKENS = 1024
TOKEN_MULTIPLE = 256  # tokens of a step, which fill a GPU's blocks


def steps_for(tokens: int, wanted: int) -> int:
    """In how many steps so many tokens of all ranks go, of those that are wanted at most; 1: not in steps."""
    return max(1, min(wanted, tokens // LEAST_STEP_TOKENS))


def row_steps(rows: int, tokens_of_row: int, steps: int) -> list[slice]:
    """The rows of a shard that make a step, all of one size but the last."""
    multiple = max(1, TOKEN_MULTIPLE // tokens_of_row)
    size = -(-rows // (steps * multiple)) * multiple
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def add_pieces(pieces: Tensor, out: Tensor) -> None:
    """``[tp, ...]`` -> ``[...]``: the sum over ranks, in float32 where they are narrower, rounded once."""
    torch.sum(pieces, dim=0, out=out)


class _Pushed(NamedTuple):
    """A step's partial sums on their way: ``arrived()`` gives those for this rank, whose sum goes to ``out``."""

    arrived: Callable[[], Tensor]
    out: Tensor


class StepComm:
    """One pass over the steps, where every rank has all tokens: partial sums are all-reduced.

    Args:
        group: the tensor-parallel group.
        sources: what steps are fetched from, ``[rows, ..., features]``.
        blocking: every collective ends before the next product begins.
    """

    pieces = 1

    def __init__(self, group: dist.ProcessGroup, sources: Sequence[Tensor], blocking: bool = False) -> None:
        self.group, self.sources, self.blocking = group, sources, blocking
        self._works: list[dist.Work] = []

    def room(self, source: int, rows: slice) -> Tensor:
        """``[tokens, features]`` for the rows of all ranks."""
        return flat(self.sources[source][rows])

    def fetch(self, source: int, rows: slice, into: Tensor) -> Callable[[], object]:
        """Start to fill what ``room`` gave, or the rows' part of a larger room.

        Returns:
            What is to be called before that is read.
        """
        return _nothing

    def partial(self, out: Tensor) -> Tensor:
        """``[tokens, features]`` for the partial sums of which this rank's end in ``out [rows, ..., features]``."""
        return flat(out)

    def push(self, partial: Tensor, out: Tensor) -> None:
        """Start to add up over ranks; ``out`` is ready after ``finish``."""
        work = dist.all_reduce(partial, group=self.group, async_op=not self.blocking)
        if work is not None:
            self._works.append(work)

    def finish(self) -> None:
        """Wait for all that was pushed."""
        for work in self._works:
            work.wait()


class ScatteredSteps(StepComm):
    """One pass over the steps under sequence parallelism, by collectives; this module says how steps are cut."""

    def __init__(self, group: dist.ProcessGroup, sources: Sequence[Tensor], blocking: bool = False) -> None:
        super().__init__(group, [source.contiguous() for source in sources], blocking)
        self.pieces = group.size()
        self._pushed: _Pushed | None = None

    def room(self, source: int, rows: slice) -> Tensor:
        shard = self.sources[source]
        tokens = (rows.stop - rows.start) * self.pieces * shard[0].numel() // shard.shape[-1]
        return shard.new_empty(tokens, shard.shape[-1])

    def fetch(self, source: int, rows: slice, into: Tensor) -> Callable[[], object]:
        work = dist.all_gather_into_tensor(
            into, flat(self.sources[source][rows]), group=self.group, async_op=not self.blocking
        )
        return _nothing if work is None else work.wait

    def partial(self, out: Tensor) -> Tensor:
        return out.new_empty(self.pieces * out[..., 0].numel(), out.shape[-1])

    def push(self, partial: Tensor, out: Tensor) -> None:
        """Send each rank its rows. One step is on its way at a time: those of the step before are added up."""
        before, self._pushed = self._pushed, None
        self._settle(before)
        self._pushed = _Pushed(self._send(partial, out), out)
        self._add(before)

    def _settle(self, pushed: _Pushed | None) -> None:
        """What a step on its way asks for before the next one is sent."""

    def _send(self, partial: Tensor, out: Tensor) -> Callable[[], Tensor]:
        received = torch.empty_like(partial)
        work = dist.all_to_all_single(received, partial, group=self.group, async_op=not self.blocking)

        def arrived(partial: Tensor = partial) -> Tensor:  # which lives until it has gone
            if work is not None:
                work.wait()
            return received

        return arrived

    def _add(self, pushed: _Pushed | None) -> None:
        if pushed is not None:
            add_pieces(pushed.arrived().view(self.pieces, *pushed.out.shape), pushed.out)

    def finish(self) -> None:
        self._settle(self._pushed)
        self._add(self._pushed)
        self._pushed = None


def _nothing() -> None:
    pass


def start_steps(
    group: dist.ProcessGroup, sequence_parallel: bool, sources: Sequence[Tensor], transport: Transport, step_bytes: int
) -> StepComm:
    """Begin a pass over the steps.

    Args:
        group: the tensor-parallel group; all of its ranks begin the same passes, in the same order.
        sequence_parallel: ranks hold shards of the tokens; else each has all of them.
        sources: as for ``StepComm``.
        transport: what to move bytes with.
        step_bytes: of the largest step's partial sums.
    """
    if not sequence_parallel:
        return StepComm(group, sources, blocking=transport == "blocking")
    if transport == "auto" and sources[0].is_cuda:
        from megatron_tiling.tiles.symmetric import SymmetricSteps, workspace_for

        workspace = workspace_for(group, sources, step_bytes)
        if workspace is not None:
            return SymmetricSteps(group, sources, workspace, step_bytes)
    return ScatteredSteps(group, sources, blocking=transport == "blocking")

"""Tensor-parallel communication of a loop that goes by steps of tokens, each step's behind the products of others.

A pass over the loop (forward or backward) fetches the tokens of its steps, and pushes its partial sums to the ranks
that they belong to. Under sequence parallelism, where a rank holds a shard ``[s/tp, ..., h]`` of the tokens, it begins
with half of its own, goes on with those of the other ranks, from the next one on, and ends with the rest of its own:
nothing has to arrive before the first step, and nothing is left to send after the last. Tokens are independent in the
loop, so their order is of no account. Partial sums arrive as they are and are added in float32 in the order of the
ranks: the same numbers however bytes move.

Bytes move by the copy engines of GPUs that see each other's memory (``symmetric.py``), else by sends and receives.
Depends on torch alone.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil, prod
from typing import Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.device import has_kernels, on_gpu

#: ``auto``: symmetric memory where it is there, else collectives beside the products. ``blocking``: one after another.
Transport = Literal["auto", "collectives", "blocking"]
#: A step of fewer tokens costs more in small products and launches than it hides.
LEAST_STEP_TOKENS = 1024
#: ``auto``: from so many operations on, forward and backward, of this rank's products in a call of an MLP, and of
#: another layer. Fewer are done before a slow host has launched their steps. Whole models over 4 H200s gained with
#: 8.7e12 of an MLP, 1.0e12 of qkv and 0.8e12 of proj, and with 4.3e12, 0.6e12 and 0.4e12; one lost, with 2.2e12, 0.3e12
#: and 0.2e12 (benchmarks/results/2026-11-28-whole-model-tp4-8192-4-steps.md, -4096-16k.md and -4096-4-steps.md).
LEAST_MLP_OPERATIONS, LEAST_LAYER_OPERATIONS = 4e12, 4e11
TOKEN_MULTIPLE = 256  # tokens of a step, which fill a GPU's blocks
#: Where this rank's own tokens come in a pass: first where others are only fetched, last where sums are only pushed.
Own = Literal["first", "last", "both"]
Wait = Callable[[], object]


class Piece(NamedTuple):
    """Rows of the shard of the rank that comes ``ahead`` places after this one."""

    ahead: int
    rows: slice


class Step(NamedTuple):
    """The pieces of a step, and where its tokens are among all, in the order in which a pass takes them."""

    pieces: tuple[Piece, ...]
    tokens: slice

    @property
    def own_rows(self) -> slice | None:
        """The rows of this rank's shard, if there are no others in the step."""
        return self.pieces[0].rows if len(self.pieces) == 1 and self.pieces[0].ahead == 0 else None


def steps_for(tokens: int, wanted: int, least_tokens: int = 0) -> int:
    """In how many steps so many tokens of all ranks go, of those that are wanted at most; 1: not in steps.

    Fewer than ``least_tokens`` do not.
    """
    return 1 if tokens < least_tokens else max(1, min(wanted, tokens // LEAST_STEP_TOKENS))


def tokens_for(operations: float, weights: int) -> int:
    """Tokens whose products with so many weights are so many operations, forward and backward."""
    return ceil(operations / (6 * weights))


def cut(rows: int, tokens_of_row: int, ranks: int, steps: int, own: Own = "both") -> list[Step]:
    """The steps of a pass.

    Args:
        rows: of a shard; of all tokens where ``ranks`` is 1.
        tokens_of_row: tokens of one row.
        ranks: that hold shards.
        steps: at most; with 2 they are the own shard and the others.
        own: where the own shard comes: as one step, or half of it each with ``both`` and more than 2 steps.
    """
    return _cut(rows, tokens_of_row, ranks, steps, max(1, TOKEN_MULTIPLE // tokens_of_row), own)


@lru_cache
def _cut(rows: int, tokens_of_row: int, ranks: int, steps: int, multiple: int, own: Own) -> list[Step]:
    if ranks == 1:
        bounds = _bounds(0, rows, steps, multiple)
    else:
        half = _rounded_up(rows, 2, multiple) if steps > 2 else rows
        head = {"first": rows, "last": 0, "both": half}[own]
        edges = 0, head, head + (ranks - 1) * rows, ranks * rows
        parts = [1, max(1, steps - 1), 1]
        if own == "both" and steps > 2:
            size = multiple
            while sum(-(-(stop - start) // size) for start, stop in pairwise(edges)) > steps:
                size += multiple
            parts = [max(1, -(-(stop - start) // size)) for start, stop in pairwise(edges)]
        bounds = [
            edge for ends, count in zip(pairwise(edges), parts, strict=True) for edge in _bounds(*ends, count, multiple)
        ]
    ends = list(dict.fromkeys(bounds))
    # Where each shard begins and ends in the order in which a pass takes rows: own, others, own.
    spans = [(0, 0, rows)] if ranks == 1 else [(0, 0, head)]
    spans += [(ahead, 0, rows) for ahead in range(1, ranks)]
    spans += [(0, head, rows)] if ranks > 1 and head < rows else []
    found = []
    for start, stop in pairwise(ends):
        pieces, position = [], 0
        for ahead, first, last in spans:
            begin, end = (first + max(edge - position, 0) for edge in (start, stop))
            if begin < min(end, last):
                pieces.append(Piece(ahead, slice(begin, min(end, last))))
            position += last - first
        found.append(Step(tuple(pieces), slice(start * tokens_of_row, stop * tokens_of_row)))
    return found


def few_steps(steps: list[Step]) -> list[Step]:
    """The same tokens in the same order, for a pass with work of its own after the last step, to hide what that sends.

    The first step stays where there are tokens of other ranks, which arrive during it; all others are one.
    """
    alone = 1 if any(piece.ahead for step in steps for piece in step.pieces) else 0
    pieces: list[Piece] = []
    for piece in (piece for step in steps[alone:] for piece in step.pieces):
        if pieces and pieces[-1].ahead == piece.ahead and pieces[-1].rows.stop == piece.rows.start:
            pieces[-1] = Piece(piece.ahead, slice(pieces[-1].rows.start, piece.rows.stop))
        else:
            pieces.append(piece)
    return [*steps[:alone], Step(tuple(pieces), slice(steps[alone].tokens.start, steps[-1].tokens.stop))]


def places(step: Step, rows: int, rank: int, ranks: int) -> list[slice]:
    """Where a step's rows are among those of all shards, in the order of the step; neighbours make one slice.

    Args:
        rows, ranks: as for ``cut``.
        rank: this one's place in the group.
    """
    found: list[slice] = []
    for ahead, part in step.pieces:
        first = (rank + ahead) % ranks * rows
        start = found.pop().start if found and found[-1].stop == first + part.start else first + part.start
        found.append(slice(start, first + part.stop))
    return found


def _bounds(start: int, stop: int, parts: int, multiple: int) -> list[int]:
    return [*range(start, stop, max(1, _rounded_up(stop - start, parts, multiple))), stop]


def _rounded_up(size: int, parts: int, multiple: int) -> int:
    """Of a part that is a multiple, or all."""
    return min(size, -(-size // (parts * multiple)) * multiple)


def add_pieces(pieces: Tensor, out: Tensor) -> None:
    """``[tp, ...]`` -> ``[...]``: the sum over ranks, in float32 where they are narrower, rounded once."""
    if has_kernels(out):
        from megatron_tiling.tiles.kernels.add import add

        add(pieces, out)
    else:
        torch.sum(pieces, dim=0, out=out)


class StepComm:
    """One pass over the steps, where every rank has all tokens: partial sums are all-reduced.

    As a context it ends with ``finish``, or where there is an error (out of memory) with ``abandon``.

    Args:
        group: the tensor-parallel group.
        sources: what steps are fetched from, ``[rows, ..., features]``; there may be none.
        out: for the sums over ranks, ``[rows, ..., features]``; ``None`` if there are none.
        blocking: every collective ends before the next product begins.
    """

    def __init__(
        self, group: dist.ProcessGroup, sources: Sequence[Tensor], out: Tensor | None, blocking: bool = False
    ) -> None:
        self.group, self.sources, self.out, self.blocking = group, sources, out, blocking
        self._works: list[dist.Work] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *more: object) -> None:
        if error is None:
            self.finish()
        else:
            self.abandon()

    def whole(self, source: int, memory: Callable[[], Tensor]) -> Tensor:
        """``[tokens of all steps, features]``, to fetch steps into; in ``memory()`` where it is needed."""
        return flat(self.sources[source])

    def fetch(self, source: int, step: Step, into: Tensor | None = None) -> tuple[Tensor, Wait]:
        """Start to bring a step's tokens together.

        Args:
            into: the step's part of what ``whole`` gave; by default it finds another place.

        Returns:
            ``[tokens, features]``, and what is to be called before that is read.
        """
        return flat(self.sources[source][step.pieces[0].rows]) if into is None else into, _nothing

    def fetch_to_place(self, source: int, step: Step, whole: Tensor) -> Wait:
        """Start to bring a step's tokens to where they are among those of all ranks.

        Args:
            whole: what ``whole`` gave.
        """
        return _nothing

    def partial(self, step: Step) -> Tensor:
        """``[tokens, features]`` for the partial sums of a step."""
        assert self.out is not None
        return flat(self.out[step.pieces[0].rows])

    def push(self, partial: Tensor, step: Step) -> None:
        """Start to send partial sums to where they are added up."""
        work = dist.all_reduce(partial, group=self.group, async_op=not self.blocking)
        if work is not None:
            self._works.append(work)

    def finish(self) -> None:
        """Wait for what was pushed, and for the sums in ``out``."""
        for work in self._works:
            work.wait()

    def abandon(self) -> None:
        """End a pass before its time. Collectives hold what they use until they are done."""


class ScatteredSteps(StepComm):
    """One pass over the steps under sequence parallelism, by sends and receives."""

    def __init__(
        self, group: dist.ProcessGroup, sources: Sequence[Tensor], out: Tensor | None, blocking: bool = False
    ) -> None:
        super().__init__(group, [source.contiguous() for source in sources], out, blocking)
        self.rank, self.ranks = group.rank(), group.size()
        self._arriving: list[dist.Work] = []
        self.arrived = None if out is None else self._room_for_pieces(out)

    def _room_for_pieces(self, out: Tensor) -> Tensor:
        """``[tp, rows, ..., features]``: what each rank pushes to this one."""
        return out.new_empty(self.ranks, *out.shape)

    def whole(self, source: int, memory: Callable[[], Tensor]) -> Tensor:
        return memory()

    def peer(self, ahead: int) -> int:
        return (self.rank + ahead) % self.ranks

    def fetch(self, source: int, step: Step, into: Tensor | None = None) -> tuple[Tensor, Wait]:
        shard = self.sources[source]
        if into is None:
            if (own := step.own_rows) is not None:
                return flat(shard[own]), _nothing
            into = shard.new_empty(step.tokens.stop - step.tokens.start, shard.shape[-1])
        return into, self._fill(source, _parts(into, step, shard))

    def fetch_to_place(self, source: int, step: Step, whole: Tensor) -> Wait:
        shards = whole.view(self.ranks, *self.sources[source].shape)
        return self._fill(source, [(piece, shards[self.peer(piece.ahead)][piece.rows]) for piece in step.pieces])

    def _fill(self, source: int, parts: list[tuple[Piece, Tensor]]) -> Wait:
        """Copy this rank's rows of a source, and start to copy those of others."""
        for piece, part in parts:
            if piece.ahead == 0:
                part.copy_(self.sources[source][piece.rows])
        others = [(piece, part) for piece, part in parts if piece.ahead]
        return self._pull(source, others) if others else _nothing

    def _pull(self, source: int, parts: list[tuple[Piece, Tensor]]) -> Wait:
        """Start to copy other ranks' rows of a source."""
        shard = self.sources[source]
        sends = [(shard[piece.rows], self.peer(-piece.ahead)) for piece, _ in parts]
        works = self._exchange(sends, [(part, self.peer(piece.ahead)) for piece, part in parts])

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def partial(self, step: Step) -> Tensor:
        assert self.out is not None and self.arrived is not None
        if (own := step.own_rows) is not None:
            return flat(self.arrived[self.rank][own])
        return self.out.new_empty(step.tokens.stop - step.tokens.start, self.out.shape[-1])

    def push(self, partial: Tensor, step: Step) -> None:
        assert self.out is not None and self.arrived is not None
        if step.own_rows is None:
            parts = _parts(partial, step, self.out)
            for piece, part in parts:
                if piece.ahead == 0:
                    self.arrived[self.rank][piece.rows].copy_(part)
            self._send(partial, [(piece, part) for piece, part in parts if piece.ahead])

    def _send(self, sums: Tensor, parts: list[tuple[Piece, Tensor]]) -> None:
        """Start to push what belongs to other ranks; ``sums``, all of it, lives until it has gone."""
        assert self.arrived is not None
        receives = []
        for piece, _ in parts:
            behind = self.peer(-piece.ahead)
            receives.append((self.arrived[behind][piece.rows], behind))
        self._arriving += self._exchange([(part, self.peer(piece.ahead)) for piece, part in parts], receives)

    def _exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[dist.Work]:
        """To and from ranks of the group, all at once."""
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(self.group, rank), self.group)
            for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, rank in tensors
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
        if not self.blocking:
            return works
        for work in works:
            work.wait()
        return []

    def finish(self) -> None:
        for work in self._arriving:
            work.wait()
        self._arriving = []
        if self.out is not None and self.arrived is not None:
            add_pieces(self.arrived, self.out)


def _parts(tokens: Tensor, step: Step, like: Tensor) -> list[tuple[Piece, Tensor]]:
    """``[tokens, features]`` of a step, piece by piece, each ``[rows, ..., features]`` as ``like``."""
    of_row = prod(like.shape[1:-1])
    sizes = [(piece.rows.stop - piece.rows.start) * of_row for piece in step.pieces]
    shape = -1, *like.shape[1:]
    return [(piece, part.view(shape)) for piece, part in zip(step.pieces, tokens.split(sizes), strict=True)]


def _nothing() -> None:
    pass


def start_steps(comm: ColumnComm, sources: Sequence[Tensor], out: Tensor | None, transport: Transport) -> StepComm:
    """Begin a pass over the steps.

    Args:
        comm: the group, all of whose ranks begin the same passes in the same order, and whether they hold shards.
        sources, out: as for ``StepComm``.
        transport: what to move bytes with.
    """
    group = comm.group
    if not comm.sequence_parallel:
        return StepComm(group, sources, out, blocking=transport == "blocking")
    first = next(tensor for tensor in (*sources, out) if tensor is not None)
    if transport == "auto" and first.is_cuda:
        from megatron_tiling.tiles.symmetric import SymmetricSteps, workspace_for

        workspace = workspace_for(group, sources, out)
        if workspace is not None:
            return SymmetricSteps(group, sources, out, workspace)
    elif transport == "auto" and on_gpu(first):
        from megatron_tiling.tiles.planned_steps import PlannedSteps

        return PlannedSteps(group, sources, out)
    return ScatteredSteps(group, sources, out, blocking=transport == "blocking")

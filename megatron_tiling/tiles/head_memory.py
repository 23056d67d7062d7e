"""Memory of the head's loop: tiles of logits, some of which stay for the backward pass, and the input gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.head_cut import HeadCut
from megatron_tiling.tiles.stepped_linear import LinearSteps


class LogitsBuffers:
    """Memory for tiles of logits: the last ones have one each, all before share the first of these.

    Rows begin at multiples of 128 bytes. The backward pass goes from the last tile to the first, and drops what it
    needs no more.
    """

    def __init__(self, x: Tensor, cut: HeadCut, buffers: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        per_line = 128 // dtype.itemsize
        self._shape = cut.height, -(-cut.width // per_line) * per_line
        self._memory = [scratch(x, *self._shape, dtype=dtype) for _ in range(buffers)]
        self._shared = len(cut.tiles) - buffers

    def make(self, index: int, x: Tensor, weight: Tensor) -> Tensor:
        """``[n_t, h]`` and ``[v_t, h]`` -> the logits ``[n_t, v_t]`` of a tile."""
        logits = self._of(index, x, weight)
        gemm_into(logits, x, weight.t(), accumulate=False)
        return logits

    def make_first(self, x: Tensor, weight: Tensor, shard: Tensor, steps: LinearSteps) -> Tensor:
        """``make`` of the first tile, while ``x`` of all ranks is gathered from shards ``[s/tp, ..., h]``."""
        logits = self._of(0, x, weight)
        steps.gather(shard, x, lambda tokens: gemm_into(logits[tokens], x[tokens], weight.t(), accumulate=False))
        return logits

    def _of(self, index: int, x: Tensor, weight: Tensor) -> Tensor:
        """A tile's memory."""
        return self._memory[max(index - self._shared, 0)][: len(x), : len(weight)]

    def take(self, index: int, tokens: slice, columns: slice) -> Tensor:
        """The logits that ``make`` has left of a tile, before those of earlier ones are taken or made."""
        del self._memory[index - self._shared + 1 :]
        return self._memory[-1][: tokens.stop - tokens.start, : columns.stop - columns.start]

    def of_gradients(self, x: Tensor) -> Tensor | None:
        """Memory for a tile's gradient, which is an operand; ``None``: its logits' own."""
        return None if self.dtype == x.dtype else scratch(x, *self._shape)


class InputGrad:
    """The input gradient ``[n, h]``; a narrow one is summed in float32 and rounded once a token tile.

    Of chosen rows it is summed beside the whole result, whose other rows are zero. To be reduced over ranks while there
    are logits, that of a single token tile is rounded in the memory of its sum, and copied once they are gone.
    """

    def __init__(self, gathered: Tensor, rows: Tensor | None, x: Tensor, cut: HeadCut) -> None:
        self._like, self._shape = flat(gathered), gathered.shape
        self._rows = rows
        self._result: Tensor | None = None
        self._sum: Tensor | None = None
        narrow = x.element_size() < 4 and len(cut.columns) > 1
        if narrow or rows is not None:
            self._sum = x.new_empty(cut.height, x.shape[1], dtype=torch.float32 if narrow else x.dtype)
        self._reducing: tuple[Tensor, dist.Work | None] | None = None

    def add(self, tokens: slice, dz: Tensor, weight: Tensor, *, first: bool) -> None:
        """dgrad GEMM of one tile: ``[n_t, v_t]`` and ``[v_t, h]`` -> ``[n_t, h]``; all but the first add."""
        total = self.result()[tokens] if self._sum is None else self._sum[: len(dz)]
        gemm_into(total, dz, weight, accumulate=not first)

    def round(self, tokens: slice) -> None:
        """Take over the sum of a token tile, once all its vocabulary tiles are added."""
        if self._sum is not None:
            total = self._sum[: tokens.stop - tokens.start]
            if self._rows is None:
                self.result()[tokens] = total
            else:
                self.result().index_copy_(0, self._rows[tokens], total.to(self._like.dtype))

    def reduce(self, tokens: slice, comm: ColumnComm) -> None:
        """Start the reduction over ranks, once all vocabulary tiles of the last token tile are added."""
        if self._sum is not None and self._rows is None and self._result is None:  # a single token tile
            rounded, rest = (half.view(self._shape) for half in rounded_in_place(self._sum, self._like.dtype))
            self._reducing = comm.reduce(rounded, rest)
        else:
            self.round(tokens)
            self._reducing = comm.reduce(self.result().view(self._shape))

    def finish(self, tokens: slice) -> Tensor:
        """The gradient of ``gathered``, or of what was gathered, after all tiles; the logits' memory is there again."""
        if self._reducing is None:
            self.round(tokens)
            return self.result().view(self._shape)
        reduced, work = self._reducing
        if work is not None:
            work.wait()
        return reduced.clone() if self._result is None else reduced

    def result(self) -> Tensor:
        """Of all tokens, made at the first call: a single token tile can wait for the logits' memory."""
        if self._result is None:
            self._result = torch.empty_like(self._like) if self._rows is None else torch.zeros_like(self._like)
        return self._result


def rounded_in_place(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A sum ``[n, h]`` in half as wide a ``dtype``, in the first half of its memory; and the other half, ``[n, h]``.

    As many rows at a time as are rounded already go where earlier ones were.
    """
    rounded, rest = total.view(dtype).view(2, *total.shape)
    rounded[:1] = total[:1].to(dtype)
    done = 1
    while done < len(total):
        rounded[done : 2 * done] = total[done : 2 * done]
        done *= 2
    return rounded, rest

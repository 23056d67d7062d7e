"""Memory of the head's loop: tiles of logits, some of which stay for the backward pass, and the input gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tiling.tiles.comm import flat
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.head_cut import HeadCut


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
        logits = self._memory[max(index - self._shared, 0)][: len(x), : len(weight)]
        gemm_into(logits, x, weight.t(), accumulate=False)
        return logits

    def take(self, index: int, tokens: slice, columns: slice) -> Tensor:
        """The logits that ``make`` has left of a tile, before those of earlier ones are taken or made."""
        del self._memory[index - self._shared + 1 :]
        return self._memory[-1][: tokens.stop - tokens.start, : columns.stop - columns.start]

    def of_gradients(self, x: Tensor) -> Tensor | None:
        """Memory for a tile's gradient, which is an operand; ``None``: its logits' own."""
        return None if self.dtype == x.dtype else scratch(x, *self._shape)


class InputGrad:
    """The input gradient ``[n, h]``; a narrow one is summed in float32 and rounded once a token tile.

    Of chosen rows it is summed beside the whole result, whose other rows are zero.
    """

    def __init__(self, gathered: Tensor, rows: Tensor | None, x: Tensor, cut: HeadCut) -> None:
        self._like = flat(gathered)
        self._rows = rows
        self._result: Tensor | None = None
        self._sum: Tensor | None = None
        narrow = x.element_size() < 4 and len(cut.columns) > 1
        if narrow or rows is not None:
            self._sum = x.new_empty(cut.height, x.shape[1], dtype=torch.float32 if narrow else x.dtype)

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

    def result(self) -> Tensor:
        """Of all tokens, made at the first call: a single token tile can wait for the logits' memory."""
        if self._result is None:
            self._result = torch.empty_like(self._like) if self._rows is None else torch.zeros_like(self._like)
        return self._result

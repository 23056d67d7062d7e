"""Neighbouring tiles of an MLP whose fc1 products are one, over views of its weight. Depends on torch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT


@dataclass(frozen=True)
class Span:
    """Neighbouring tiles whose fc1 products are one. For a gated linear unit, the same features of gate and up.

    ``pre [halves, n, width]`` below is a view of one buffer ``[n, halves * width]``, rows padded if it is scratch.
    """

    tiles: list[slice]
    halves: int
    intermediate: int
    kept: bool

    @property
    def columns(self) -> slice:
        return slice(self.tiles[0].start, self.tiles[-1].stop)

    @property
    def whole(self) -> bool:
        return self.columns.stop - self.columns.start == self.intermediate

    @property
    def one_matrix(self) -> bool:
        """Whether the rows of the weight are adjacent, gate's and up's."""
        return self.halves == 1 or self.whole

    def of_tile(self, pre: Tensor, tile: slice) -> Tensor:
        """``[halves, n, f_i]`` of one of the tiles."""
        start = self.columns.start
        return pre[:, :, tile.start - start : tile.stop - start]

    def fc1(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of ``x @ weight.T`` over factors ``x [n, h]``, ``weight [halves * f, h]`` -> ``pre``."""
        first, width = factors[0][0], self.columns.stop - self.columns.start
        buffer = scratch(first, first.shape[0], self.halves, width if self.one_matrix else padded(width))
        pre = buffer[:, :, :width].transpose(0, 1)
        for index, (x, weight) in enumerate(factors):
            rows = self._rows(weight)
            if self.one_matrix:
                gemm_into(_side_by_side(pre), x, rows.flatten(0, 1).t(), accumulate=index > 0)
            else:
                gemm_into(pre, x.expand(self.halves, -1, -1), rows.transpose(1, 2), accumulate=index > 0)
        return pre

    def dgrad(self, total: Tensor, grad: Tensor, weight: Tensor, accumulate: bool) -> None:
        """``grad``, shaped as ``pre`` -> ``total [n, h]``."""
        rows = self._rows(weight)
        if self.one_matrix:
            gemm_into(total, _side_by_side(grad), rows.flatten(0, 1), accumulate=accumulate)
        else:
            for half in range(self.halves):
                gemm_into(total, grad[half], rows[half], accumulate=accumulate or half > 0)

    def wgrad(self, total: Tensor, grad: Tensor, x: Tensor, accumulate: bool) -> None:
        """``grad``, shaped as ``pre``, and ``x [n, h]`` -> this span's rows of ``total``, shaped as the weight."""
        rows = self._rows(total)
        if self.one_matrix:
            gemm_into(rows.flatten(0, 1), _side_by_side(grad).t(), x, accumulate=accumulate)
        else:
            gemm_into(rows, grad.transpose(1, 2), x.expand(self.halves, -1, -1), accumulate=accumulate)

    def _rows(self, weight: Tensor) -> Tensor:
        """``[halves * f, h]`` -> ``[halves, width, h]``, a view."""
        return weight.unflatten(0, (self.halves, -1))[:, self.columns]


def _side_by_side(pre: Tensor) -> Tensor:
    """``[halves, n, width]`` -> ``[n, halves * width]``, a view of the buffer."""
    return pre.transpose(0, 1).flatten(1)


def padded(width: int) -> int:
    """So many columns that each row of scratch memory begins aligned."""
    return -(-width // FEATURE_ALIGNMENT) * FEATURE_ALIGNMENT

"""Partition arithmetic: which rows and columns of a weight shard make tile (o, i).

Pure Python. Tiles subdivide what one rank holds, never the global weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

#: Features. Tiles of resident layers begin where GEMMs and vector accesses are fast, if the weight's rows do.
FEATURE_ALIGNMENT = 16
#: Of a tile's products, forward and backward, that its borders cost little beside. MLPs of 2.2e12 to 8.7e12 in four
#: tiles took 1.01 to 1.04 of their time in one, and of 1.7e13 in four or 8.7e12 in two 1.00 to 1.01, at TP=1, 2 and 4
#: (benchmarks/results/2026-11-27-mlp-te.md, 2026-11-28-tp-overlap-tp4.md and -tp2.md). Experts of 1.9e12 and 3.7e12
#: took 1.01 and 1.08 in two, and up to 1.23 in four (2026-11-28-experts-small.md).
LEAST_TILE_OPERATIONS = 3.5e12


def tiles_worth_it(rows: int, weights: int, most: int) -> int:
    """How many tiles of an MLP, of ``most``, have enough work each for their borders to cost little; at least 1.

    Args:
        rows: tokens; of grouped experts the rows of all of them.
        weights: fc1's and fc2's elements on this rank; of grouped experts one expert's.
    """
    return max(1, min(most, int(6 * rows * weights / LEAST_TILE_OPERATIONS)))


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Boundaries ``[0, ..., num_items]`` of ``num_parts`` ranges; the first ones take the remainder.

    The same boundaries as ``deepspeed.runtime.utils.partition_uniform``, so that tile keys and shapes agree.

    >>> partition_uniform(10, 4)
    [0, 3, 6, 8, 10]
    """
    size, remainder = divmod(num_items, num_parts)
    return [part * size + min(part, remainder) for part in range(num_parts + 1)]


@dataclass(frozen=True)
class TileGrid:
    """An ``in_splits`` x ``out_splits`` grid of tiles over a weight shard ``[out_features, in_features]``.

    Args:
        in_features, out_features: columns and rows of this rank's weight shard.
        in_splits, out_splits: tiles along the columns and along the rows.
        paired: the rows are the two halves ``[gate | up]`` of a gated linear unit, and out-tile ``o`` holds the
            same features of both halves. ``out_parts`` then counts features of one half.
        alignment: tiles begin at multiples of it where the features are a multiple of it, and enough.

    Raises:
        ValueError: a split is not within ``[1, features]``, or ``paired`` rows are odd in number.

    >>> TileGrid(4, 12, 1, 3, paired=True).row_ranges(0)
    (slice(0, 2, None), slice(6, 8, None))
    """

    in_features: int
    out_features: int
    in_splits: int = 1
    out_splits: int = 1
    paired: bool = False
    alignment: int = 1

    def __post_init__(self) -> None:
        if self.paired and self.out_features % 2:
            raise ValueError(f"a gated linear unit needs an even number of rows, not {self.out_features}")
        for name, splits, limit in (
            ("in_splits", self.in_splits, self.in_features),
            ("out_splits", self.out_splits, self.tiled_out_features),
        ):
            if not 1 <= splits <= limit:
                raise ValueError(f"{name}={splits} is not within [1, {limit}], the features that can be split")

    @property
    def tiled_out_features(self) -> int:
        """Rows that ``out_parts`` divides: all of them, or one half of ``paired`` rows."""
        return self.out_features // 2 if self.paired else self.out_features

    @property
    def tiles(self) -> int:
        return self.in_splits * self.out_splits

    def indices(self) -> Iterator[tuple[int, int]]:
        """``(o, i)`` of each tile, row by row."""
        return product(range(self.out_splits), range(self.in_splits))

    # No cached properties: torch.compile of torch 2.10 cannot trace one in a frozen class.
    @property
    def in_parts(self) -> list[int]:
        return self._partition(self.in_features, self.in_splits)

    @property
    def out_parts(self) -> list[int]:
        return self._partition(self.tiled_out_features, self.out_splits)

    def _partition(self, features: int, splits: int) -> list[int]:
        blocks, rest = divmod(features, self.alignment)
        if rest or blocks < splits:
            return partition_uniform(features, splits)
        return [block * self.alignment for block in partition_uniform(blocks, splits)]

    def columns(self, in_tile: int) -> slice:
        return slice(*self.in_parts[in_tile : in_tile + 2])

    def row_ranges(self, out_tile: int) -> tuple[slice, ...]:
        """The weight rows of an out-tile: one range, or its gate range and its up range."""
        start, stop = self.out_parts[out_tile : out_tile + 2]
        if not self.paired:
            return (slice(start, stop),)
        half = self.tiled_out_features
        return slice(start, stop), slice(half + start, half + stop)

    def in_size(self, in_tile: int) -> int:
        return self.in_parts[in_tile + 1] - self.in_parts[in_tile]

    def out_size(self, out_tile: int) -> int:
        """Features of an out-tile's output, gate and up together."""
        return sum(rows.stop - rows.start for rows in self.row_ranges(out_tile))

    def check_parts(self, sizes: Sequence[int]) -> None:
        """Refuse an already split input whose parts are not this grid's in-tiles.

        Raises:
            ValueError: naming the number of parts, or the first part of another width.
        """
        if len(sizes) != self.in_splits:
            raise ValueError(
                f"the input is split into {len(sizes)} parts, but the layer has in_splits={self.in_splits}"
            )
        for index, size in enumerate(sizes):
            if size != self.in_size(index):
                raise ValueError(f"input part {index} has {size} features, its tile takes {self.in_size(index)}")

    def __str__(self) -> str:
        return f"{self.in_splits}x{self.out_splits}"

"""Which experts make a tile: groups of about as many rows each, and experts that are larger than that.

Pure Python. The rows of a rank are sorted by expert, so neighbouring experts are one range of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT, TileGrid, partition_uniform


class Segment(NamedTuple):
    """Rows of one expert."""

    expert: int
    rows: slice


@dataclass(frozen=True)
class Group:
    """Tiles whose fc1 products are one: of neighbouring experts, or of one expert, each with some of its features.

    Args:
        tiles: neighbouring experts and their rows, none of which are empty, tile by tile; of an expert in several tiles
            all its rows.
        parts: boundaries ``(0, ..., f)`` over the intermediate features, of which an expert in several tiles has more.
        kept: the first so many tiles keep their pre-activations for the backward pass; all or none, where these are
            tiles of experts.
    """

    tiles: tuple[tuple[Segment, ...], ...]
    parts: tuple[int, ...]
    kept: int

    @property
    def count(self) -> int:
        return len(self.tiles) * (len(self.parts) - 1)

    @property
    def keeps_all(self) -> bool:
        return self.kept == self.count

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(chain(*self.tiles))

    @property
    def rows(self) -> slice:
        return rows_of(self.segments)

    @property
    def columns(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(self.parts)]

    @property
    def kept_columns(self) -> slice:
        return slice(0, self.parts[-1] if self.keeps_all else self.parts[self.kept])

    @property
    def steps(self) -> tuple[tuple[Segment, ...], ...]:
        """What the forward pass computes at once, with all features: as many rows as hold the bytes of a tile."""
        if len(self.parts) == 2:
            return self.tiles
        ((expert, rows),) = self.segments
        bounds = partition_uniform(rows.stop - rows.start, len(self.parts) - 1)
        return tuple((Segment(expert, slice(rows.start + a, rows.start + b)),) for a, b in pairwise(bounds))


def cut_by_rows(groups: Sequence[Group], multiple: int) -> list[Group]:
    """As many tiles, each a group of its own with all features: of an expert in several tiles some of its rows.

    These begin at multiples of ``multiple``, if there are enough. The first so many tiles are kept, as before.

    >>> [group.tiles for group in cut_by_rows(expert_groups([64], 32, 2, keep=0), 32)]
    [((Segment(expert=0, rows=slice(0, 32, None)),),), ((Segment(expert=0, rows=slice(32, 64, None)),),)]
    """
    cut = []
    for group in groups:
        whole, tiles = (0, group.parts[-1]), group.tiles
        if len(group.parts) > 2:
            ((expert, rows),) = group.segments
            blocks = -(-(rows.stop - rows.start) // multiple)
            bounds = partition_uniform(blocks, min(blocks, len(group.parts) - 1))
            starts = [rows.start + multiple * block for block in bounds[:-1]]
            tiles = tuple((Segment(expert, slice(*part)),) for part in pairwise((*starts, rows.stop)))
        cut += [Group((tile,), whole, int(index < group.kept)) for index, tile in enumerate(tiles)]
    return cut


def rows_of(segments: Sequence[Segment]) -> slice:
    """Of neighbouring experts."""
    return slice(segments[0].rows.start, segments[-1].rows.stop)


def expert_groups(rows: Sequence[int], features: int, tiles: int, keep: int) -> list[Group]:
    """At most ``tiles`` tiles, balanced by their rows times features; none of experts without rows.

    Args:
        rows: of each local expert.
        features: intermediate features of an expert on this rank.
        tiles: at least 1.
        keep: the first so many of them keep their pre-activations.

    >>> [(len(group.segments), group.parts) for group in expert_groups([1, 1, 0, 6, 4], 32, 4, keep=0)]
    [(2, (0, 32)), (1, (0, 16, 32)), (1, (0, 32))]
    """
    limit = max(1, -(-sum(rows) // tiles))
    found = _within(limit, rows, features)
    while sum(cuts for _, cuts in found) > tiles:
        limit += -(-limit // 16)
        found = _within(limit, rows, features)
    groups: list[Group] = []
    for segments, cuts in found:
        parts = TileGrid(features, 1, in_splits=cuts, alignment=FEATURE_ALIGNMENT).in_parts
        group = Group((tuple(segments),), tuple(parts), min(keep, cuts))
        keep -= group.kept
        if groups and cuts == 1 and group.kept and groups[-1].parts == group.parts:  # the one before keeps its own
            group = Group((*groups[-1].tiles, *group.tiles), group.parts, groups[-1].kept + 1)
            groups.pop()
        groups.append(group)
    return groups


def _within(limit: int, rows: Sequence[int], features: int) -> list[tuple[list[Segment], int]]:
    """Groups of at most ``limit`` rows, and experts with more rows than that, with their tiles."""
    found: list[tuple[list[Segment], int]] = []
    start = held = 0
    for expert, count in enumerate(rows):
        segment = Segment(expert, slice(start, start + count))
        start += count
        if not count:
            continue
        if found and held + count <= limit:
            found[-1][0].append(segment)
        else:
            held = 0
            found.append(([segment], min(-(-count // limit), features)))
        held += count
    return found

"""Partition arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tiling import TileGrid
from megatron_tiling.tiles.grid import partition_uniform


@given(st.integers(1, 500), st.integers(1, 40))
def test_partitions_are_deepspeeds(items: int, parts: int) -> None:
    from deepspeed.runtime.utils import partition_uniform as deepspeed_partition

    if parts <= items:  # more parts than items are refused
        assert partition_uniform(items, parts) == deepspeed_partition(items, parts)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_tiles_cover_the_weight_once(rows: int, columns: int, in_splits: int, out_splits: int, paired: bool) -> None:
    rows *= 2 if paired else 1
    in_splits, out_splits = min(in_splits, columns), min(out_splits, rows // 2 if paired else rows)
    grid = TileGrid(columns, rows, in_splits, out_splits, paired)
    cells = [
        (row, column)
        for o in range(out_splits)
        for i in range(in_splits)
        for rows_of_tile in grid.row_ranges(o)
        for row in range(rows)[rows_of_tile]
        for column in range(columns)[grid.columns(i)]
    ]
    assert sorted(cells) == [(row, column) for row in range(rows) for column in range(columns)]
    assert sum(map(grid.out_size, range(out_splits))) == rows
    assert sum(map(grid.in_size, range(in_splits))) == columns


def test_paired_tile_holds_the_same_features_of_gate_and_up() -> None:
    grid = TileGrid(4, 14, 1, 3, paired=True)
    assert grid.out_parts == [0, 3, 5, 7]
    assert grid.row_ranges(1) == (slice(3, 5), slice(10, 12))


def test_aligned_tiles_begin_at_multiples_where_the_features_allow_it() -> None:
    assert TileGrid(160, 8, 3, 1, alignment=16).in_parts == [0, 64, 112, 160]
    assert TileGrid(8, 320, 1, 3, paired=True, alignment=16).out_parts == [0, 64, 112, 160]
    assert TileGrid(150, 8, 3, 1, alignment=16).in_parts == [0, 50, 100, 150]  # rows begin anywhere as it is
    assert TileGrid(32, 8, 3, 1, alignment=16).in_parts == [0, 11, 22, 32]  # too few for whole blocks


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((8, 6, 9, 1), r"in_splits=9 is not within \[1, 8\]"),
        ((8, 6, 1, 0), r"out_splits=0 is not within \[1, 6\]"),
        ((8, 6, 1, 4, True), r"out_splits=4 is not within \[1, 3\]"),
        ((8, 7, 1, 2, True), "even number of rows, not 7"),
    ],
)
def test_impossible_grids_are_refused(grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileGrid(*grid)

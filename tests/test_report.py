"""The startup table, and what it advises."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_tiling.report import LayerReport, coarser_splits, table
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head_cut import HeadTiles

OVERLAP = "at most 4 token steps, communication behind products from 2048 tokens on"
MLP: dict[str, Any] = {"mlp": "decoder.layers.0.mlp"}


def layer(name: str, shape: tuple[int, int], splits: tuple[int, int], **what: Any) -> LayerReport:
    """Of a partitioned layer, unless ``what`` says otherwise."""
    grid = TileGrid(shape[1], shape[0], *splits, paired=name.endswith("fc1"))
    return LayerReport(f"decoder.layers.0.{name}", shape, 2, grid, **({"partitioned": True} | what))


def reports(**mlp: Any) -> list[LayerReport]:
    """The layers of an 8B Llama, the output layer cut into 16, the others into 4.

    A tile of the MLP has 44 million elements, of the output layer 33, of qkv 6, of proj 4.
    """
    return [
        layer("self_attention.linear_qkv", (6144, 4096), (1, 4)),
        layer("self_attention.linear_proj", (4096, 4096), (4, 1)),
        layer("mlp.linear_fc1", (28672, 4096), (1, 4), **(mlp or MLP)),
        layer("mlp.linear_fc2", (4096, 14336), (4, 1), **(mlp or MLP)),
        LayerReport("output_layer", (128256, 4096), 2, TileGrid(4096, 128256, 1, 16), partitioned=True),
    ]


def test_tiles_as_large_as_those_gathered_anyway() -> None:
    assert coarser_splits(reports()) == {"qkv": (1, 1), "proj": (1, 1), "output": (1, 12)}
    advice = table(reports()).splitlines()[-1]
    assert advice.endswith(": --tiled-linear-splits qkv=1x1 proj=1x1 output=1x12")


def test_the_largest_tile_sets_the_size() -> None:
    """Without a TiledMLP the largest is one of the output layer, 33 million elements; fc2 could be cut into 2."""
    assert coarser_splits(reports(reason="TiledMLP is a word of this reason"))["fc2"] == (2, 1)


def test_no_advice_where_no_tiles_are_partitioned_or_none_can_be_larger() -> None:
    assert "Fewer" not in table(reports()[2:4])
    assert "Fewer" not in table([replace(report, partitioned=False) for report in reports()])
    finest = layer("self_attention.linear_qkv", (6144, 4096), (1, 4))
    assert coarser_splits([finest]) == {}


def test_one_layer_that_needs_its_tiles_speaks_for_its_module() -> None:
    keys = layer("self_attention.linear_kv", (64, 64), (1, 4))
    queries = layer("self_attention.linear_q", (4096, 64), (1, 4))
    assert coarser_splits([keys, queries]) == {}


def test_table() -> None:
    """Shapes and grids in one order; for the output layer what the loss uses, not the grid of whole logits."""
    mlp = {"partitioned": False, "mlp": "decoder.layers.0.mlp", "kept_tiles": 4}
    layers = [
        layer("self_attention.linear_qkv", (6144, 4096), (1, 4)),
        layer("mlp.linear_fc1", (28672, 4096), (1, 4), **mlp),
        layer("mlp.linear_fc2", (4096, 14336), (4, 1), **(mlp | {"kept_tiles": 1})),
        replace(layer("mlp.linear_fc2", (4096, 14336), (4, 1)), name="decoder.layers.1.mlp.linear_fc2"),
        LayerReport("mtp.layers.0.eh_proj", (8, 16), 2, reason="not one of the modules that are tiled"),
        LayerReport("output_layer", (128256, 4096), 2, TileGrid(4096, 128256, 1, 4), loss_tiles=HeadTiles(272)),
        LayerReport("mlp.experts", (3072, 4096), 2, experts=8, expert_tiles=4, kept_tiles=0, gathers_rows=True),
        LayerReport("moe.experts", (3072, 4096), 2, experts=8, reason="--moe-paged-stash: tiles do not do this"),
        layer("mlp.linear_fc1", (64, 32), (1, 4), **(mlp | {"overlap_steps": 4})),
        layer("mlp.linear_fc1", (64, 32), (1, 4), **(mlp | {"no_overlap": "FP8", "fp8": True})),
        LayerReport("mlp.experts", (64, 32), 2, experts=8, expert_tiles=4, no_overlap="experts"),
        replace(layer("self_attention.linear_qkv", (64, 32), (1, 1)), partitioned=False, overlap_steps=4),
        replace(layer("self_attention.linear_proj", (64, 32), (1, 1)), partitioned=False, no_overlap="an expert"),
        layer("mlp.linear_fc2", (32, 64), (4, 1), **(mlp | {"overlap_steps": 4, "least_overlap_tokens": 5000})),
        LayerReport("output_layer", (64, 32), 2, TileGrid(32, 64, 1, 4), loss_tiles=HeadTiles(9, 8), overlap_steps=4),
    ]
    assert [line.split(maxsplit=1)[1].split() for line in table(layers).splitlines()[1:16]] == [
        "1 4096 x 6144 1x4 12.00 partitioned".split(),
        "1 4096 x 28672 1x4 56.00 TiledMLP, keep all, at most 4 token steps".split(),
        "1 14336 x 4096 4x1 28.00 TiledMLP, keep 1, at most 4 token steps".split(),
        "1 14336 x 4096 4x1 28.00 partitioned".split(),
        "1 16 x 8 dense 0.00 not one of the modules that are tiled".split(),
        "1 4096 x 128256 - - loss in tiles of tokens x columns of logits within 272 MiB, keep what fits".split(),
        "1 8 x 4096 x 3072 - - TiledExperts, at most 4 tiles of about as many rows, keep 0, tokens kept once".split(),
        "1 8 x 4096 x 3072 dense - --moe-paged-stash: tiles do not do this".split(),
        f"1 32 x 64 1x4 0.00 TiledMLP, keep all, {OVERLAP}".split(),
        "1 32 x 64 1x4 0.00 TiledMLP in FP8, keep all, no overlap: FP8".split(),
        "1 8 x 32 x 64 - - TiledExperts, at most 4 tiles of about as many rows, keep 0, no overlap: experts".split(),
        f"1 32 x 64 1x1 0.00 {OVERLAP}".split(),
        "1 32 x 64 1x1 0.00 no overlap: an expert".split(),
        f"1 64 x 32 4x1 0.00 TiledMLP, keep all, {OVERLAP.replace('2048', '5000')}".split(),
        "1 32 x 64 - - loss in tiles of 8 tokens x columns of logits within 9 MiB, keep what fits, "
        f"{OVERLAP}, where one tile of logits has all tokens".split(),
    ]
    assert table(layers[:1] * 3).splitlines()[1].split()[:2] == ["decoder.layers.*.self_attention.linear_qkv", "3"]


@pytest.mark.parametrize(
    "tiles, cells",
    [
        (HeadTiles(100, tokens=512), "loss in tiles of 512 tokens x columns of logits within 100 MiB, keep what fits"),
        (
            HeadTiles(100, vocabulary_tiles=16),
            "loss in tiles of tokens x 8192 columns of logits within 100 MiB, keep what fits",
        ),
        (
            HeadTiles(100, 512, 16, "all"),
            "loss in tiles of 512 tokens x 8192 columns of logits within 100 MiB, keep all",
        ),
        (HeadTiles(None, 512, 16, "all"), "loss in tiles of 512 tokens x 8192 columns of logits, keep all"),
    ],
)
def test_tiles_of_the_loss_fixed_by_flags(tiles: HeadTiles, cells: str) -> None:
    grid = TileGrid(4096, 128256, 1, 16)
    (line,) = table([LayerReport("output_layer", (128256, 4096), 2, grid, loss_tiles=tiles)]).splitlines()[1:]
    assert line.endswith(f" -               -         {cells}")


def test_why_a_tiled_layer_is_used_as_stock_would() -> None:
    fc2 = layer("mlp.linear_fc2", (8, 8), (2, 1), reason="linear_fc1 is not tiled")
    assert "partitioned, stock MLP: linear_fc1 is not tiled" in table([fc2])
    output = LayerReport("output_layer", (8, 8), 2, TileGrid(8, 8, 1, 2), reason="the output layer has a bias")
    assert "logits whole: the output layer has a bias" in table([output])

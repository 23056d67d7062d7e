"""What the startup table advises; whole models are converted in check_models.py."""

from megatron_tiling.report import LayerReport, coarser_splits, table
from megatron_tiling.tiles.grid import TileGrid

MLP = "partitioned, TiledMLP, keep 0"


def layer(name: str, shape: tuple[int, int], splits: tuple[int, int], note: str = "partitioned") -> LayerReport:
    paired = name.endswith("fc1")
    return LayerReport(f"decoder.layers.0.{name}", shape, TileGrid(shape[1], shape[0], *splits, paired), 2, note)


def reports(mlp: str = MLP) -> list[LayerReport]:
    """The layers of an 8B Llama, the output layer cut into 16, the others into 4.

    A tile of the MLP has 44 million elements, of the output layer 33, of qkv 6, of proj 4.
    """
    return [
        layer("self_attention.linear_qkv", (6144, 4096), (1, 4)),
        layer("self_attention.linear_proj", (4096, 4096), (4, 1)),
        layer("mlp.linear_fc1", (28672, 4096), (1, 4), mlp),
        layer("mlp.linear_fc2", (4096, 14336), (4, 1), mlp),
        LayerReport("output_layer", (128256, 4096), TileGrid(4096, 128256, 1, 16), 2, "partitioned, logits whole"),
    ]


def test_tiles_as_large_as_those_gathered_anyway() -> None:
    assert coarser_splits(reports()) == {"qkv": (1, 1), "proj": (1, 1), "output": (1, 12)}
    advice = table(reports()).splitlines()[-1]
    assert advice.endswith(": --tiled-linear-splits qkv=1x1 proj=1x1 output=1x12")


def test_the_largest_tile_sets_the_size() -> None:
    """Without a TiledMLP the largest is one of the output layer, 33 million elements; fc2 could be cut into 2."""
    assert coarser_splits(reports("partitioned, stock MLP: why"))["fc2"] == (2, 1)


def test_no_advice_where_no_tiles_are_partitioned_or_none_can_be_larger() -> None:
    mlp = reports()[2:4]
    assert "Fewer" not in table(mlp)
    assert "Fewer" not in table(reports("TiledMLP, keep all")[2:4])
    finest = layer("self_attention.linear_qkv", (6144, 4096), (1, 4))
    assert coarser_splits([finest]) == {}


def test_one_layer_that_needs_its_tiles_speaks_for_its_module() -> None:
    keys = layer("self_attention.linear_kv", (64, 64), (1, 4))
    queries = layer("self_attention.linear_q", (4096, 64), (1, 4))
    assert coarser_splits([keys, queries]) == {}

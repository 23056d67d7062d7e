"""Tile keys to dense keys and back: the arithmetic."""

import pytest
import torch
from deepspeed.runtime.zero.tiling import TiledLinear as DeepSpeedTiledLinear
from hypothesis import given
from hypothesis import strategies as st

from megatron_tiling.tiles import deepspeed_keys

LAYER = "decoder.layers.0.mlp.linear_fc1"


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_keys_are_deepspeeds(rows: int, columns: int, in_splits: int, out_splits: int, bias: bool) -> None:
    in_splits, out_splits = min(in_splits, columns), min(out_splits, rows)
    dense = torch.nn.Linear(columns, rows, bias)
    tiled = DeepSpeedTiledLinear(columns, rows, bias, in_splits, out_splits, init_linear=dense)
    expected = {f"{LAYER}.{key}": value for key, value in tiled.state_dict().items()}
    state = {f"{LAYER}.{key}": value for key, value in dense.state_dict().items()}
    found = deepspeed_keys.split_tiles(state, {"fc1": (in_splits, out_splits)}, 1)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    joined = deepspeed_keys.join_tiles(expected)
    assert joined.keys() == state.keys() and all(torch.equal(joined[key], state[key]) for key in state)


def test_a_rank_has_its_share_of_every_tile() -> None:
    weight = torch.arange(6.0)[:, None]
    state = {f"{LAYER}.weight": weight, "decoder.layers.0.mlp.linear_fc2.weight": weight.T.contiguous()}
    tiled = deepspeed_keys.split_tiles(state, {"fc1": (1, 3), "fc2": (3, 1)}, 2)
    assert [tuple(tile.shape) for tile in tiled.values()] == [(2, 1)] * 3 + [(1, 2)] * 3
    with pytest.raises(ValueError, match="4 tiles of 12 features cannot be shared by 2 ranks each; choose"):
        deepspeed_keys.split_tiles(state, {"fc1": (1, 4)}, 2)
    with pytest.raises(ValueError, match="13 tiles of 12 features"):
        deepspeed_keys.split_tiles(state, {"fc1": (1, 13)}, 2)
    with pytest.raises(ValueError, match=r"^--tiled-linear-splits output=...: there is no such layer; leave it out"):
        deepspeed_keys.split_tiles(state, {"fc1": (1, 3), "output": (1, 2)}, 2)


def test_faulty_grids_are_refused() -> None:
    state = deepspeed_keys.split_tiles(
        {f"{LAYER}.weight": torch.ones(4, 4), f"{LAYER}.bias": torch.ones(4)}, {"fc1": (2, 2)}, 1
    )
    for faulty, words in (
        ({key: value for key, value in state.items() if ".1.0.weight" not in key}, "there is no linears.1.0.weight"),
        (state | {f"{LAYER}.linears.1.0.weight": torch.ones(2, 3)}, r"linears.1.0.weight is \[2, 3\], between"),
        (state | {f"{LAYER}.linears.0.0.weight": torch.ones(0)}, "linears.0.0.weight is"),
        (state | {f"{LAYER}.linears.0.0.bias": torch.ones(2)}, "bias in the last in-tile"),
        (state | {f"{LAYER}.linears.0.1.bias": torch.ones(3)}, r"linears.0.1.bias is \[3\]"),
        (state | {f"{LAYER}.linears.01.1.weight": torch.ones(2, 2)}, "linears.01.1.weight is there twice"),
        (state | {f"{LAYER}.weight": torch.ones(4, 4)}, f"there is {LAYER}.weight, and in tiles {LAYER}.linears.0.0"),
        (state | {f"{LAYER}.linears.1.1.weight": torch.ones(2, 2).bfloat16()}, "is torch.bfloat16, beside torch.float"),
    ):
        with pytest.raises(ValueError, match=words):
            deepspeed_keys.join_tiles(faulty)


def test_flattened_keys_that_meet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a.b is there twice"):
        deepspeed_keys.flatten({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})

"""Tile keys to dense keys and back: the arithmetic, the refusals, and whole models of DeepSpeed's and Megatron's."""

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.tiling import TiledLinear as DeepSpeedTiledLinear
from hypothesis import given
from hypothesis import strategies as st
from megatron.training.checkpointing import _transpose_first_dim

from megatron_tiling.convert_deepspeed import convert, main
from megatron_tiling.tiles import deepspeed_keys as tile_keys
from tests.support.launch import ROOT, torchrun

LAYER = "decoder.layers.0.mlp.linear_fc1"


@pytest.mark.feature("DeepSpeed's tile keys to dense and back")
def test_models_there_and_back(tmp_path: Path) -> None:
    output = torchrun(ROOT / "tests" / "check_convert_deepspeed.py", tmp_path, world=2)
    assert "converted a GPT there and back" in output and "converted a Llama there and back" in output


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_keys_are_deepspeeds(rows: int, columns: int, in_splits: int, out_splits: int, bias: bool) -> None:
    in_splits, out_splits = min(in_splits, columns), min(out_splits, rows)
    dense = torch.nn.Linear(columns, rows, bias)
    tiled = DeepSpeedTiledLinear(columns, rows, bias, in_splits, out_splits, init_linear=dense)
    expected = {f"{LAYER}.{key}": value for key, value in tiled.state_dict().items()}
    state = {f"{LAYER}.{key}": value for key, value in dense.state_dict().items()}
    found = tile_keys.split_tiles(state, {"fc1": (in_splits, out_splits)}, 1)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    joined = tile_keys.join_tiles(expected)
    assert joined.keys() == state.keys() and all(torch.equal(joined[key], state[key]) for key in state)


def test_a_rank_has_its_share_of_every_tile() -> None:
    weight = torch.arange(6.0)[:, None]
    state = {f"{LAYER}.weight": weight, "decoder.layers.0.mlp.linear_fc2.weight": weight.T.contiguous()}
    tiled = tile_keys.split_tiles(state, {"fc1": (1, 3), "fc2": (3, 1)}, 2)
    assert [tuple(tile.shape) for tile in tiled.values()] == [(2, 1)] * 3 + [(1, 2)] * 3
    with pytest.raises(ValueError, match="4 tiles of 12 features cannot be shared by 2 ranks each; choose"):
        tile_keys.split_tiles(state, {"fc1": (1, 4)}, 2)
    with pytest.raises(ValueError, match="13 tiles of 12 features"):
        tile_keys.split_tiles(state, {"fc1": (1, 13)}, 2)


def test_faulty_grids_are_refused() -> None:
    state = tile_keys.split_tiles(
        {f"{LAYER}.weight": torch.ones(4, 4), f"{LAYER}.bias": torch.ones(4)}, {"fc1": (2, 2)}, 1
    )
    for faulty, words in (
        ({key: value for key, value in state.items() if ".1.0.weight" not in key}, "there is no linears.1.0.weight"),
        (state | {f"{LAYER}.linears.1.0.weight": torch.ones(2, 3)}, r"linears.1.0.weight is \[2, 3\], between"),
        (state | {f"{LAYER}.linears.0.0.weight": torch.ones(0)}, "linears.0.0.weight is"),
        (state | {f"{LAYER}.linears.0.0.bias": torch.ones(2)}, "bias in the last in-tile"),
        (state | {f"{LAYER}.linears.0.1.bias": torch.ones(3)}, r"linears.0.1.bias is \[3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            tile_keys.join_tiles(faulty)


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_old_orders_of_query_key_and_value(version: float, columns: tuple[int, ...]) -> None:
    heads, size = 4, 2
    value = torch.randn(3 * heads * size, *columns)
    attention = SimpleNamespace(hidden_size_per_attention_head=size, num_attention_heads_per_partition=heads)
    layer = SimpleNamespace(self_attention=attention)
    model = SimpleNamespace(language_model=SimpleNamespace(encoder=SimpleNamespace(layers=[layer])))
    key = "decoder.layers.0.self_attention.linear_qkv." + ("weight" if columns else "bias")
    found = tile_keys.reorder_qkv({key: value}, version, heads)[key]
    assert torch.equal(found, value if version >= 2 else _transpose_first_dim(value, 3, version == 0, model))


def test_unknown_orders_and_names_are_refused() -> None:
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(ValueError, match=r"checkpoint_version 4.0 is not known"):
        tile_keys.reorder_qkv({}, 4.0, 2)
    with pytest.raises(ValueError, match="an unknown number of heads"):
        tile_keys.reorder_qkv({key: torch.ones(6, 2)}, 0, None)
    with pytest.raises(ValueError, match=r"lm_head.weight is no entry"):
        tile_keys.core_names({"lm_head.weight": torch.ones(1)})


def test_names_of_old_versions() -> None:
    names = {
        "language_model.transformer.layers.1.attention.dense.bias": "decoder.layers.1.self_attention.linear_proj.bias",
        "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight": "decoder.layers.0.self_attention.q_layernorm.weight",
    }
    assert list(tile_keys.core_names(dict.fromkeys(names, torch.ones(1)))) == list(names.values())


def checkpoint(folder: Path, ranks: int = 2, tiles: bool = True) -> Path:
    """Files as DeepSpeed's engine names them, of one layer."""
    place = folder / "saved" / "global_step3"
    place.mkdir(parents=True)
    (folder / "saved" / "latest").write_text("global_step3")
    state = {f"{LAYER}.weight": torch.ones(4, 4)}
    for rank in range(ranks):
        module = tile_keys.split_tiles(state, {"fc1": (1, 2)} if tiles else {}, ranks)
        args = Namespace(tensor_model_parallel_size=2, strange=SimpleNamespace())
        torch.save({"module": module, "args": args, "global_steps": 3}, place / f"mp_rank_{rank:02d}_model_states.pt")
    return place


def test_refusals_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: str, source: Path, target: Path = tmp_path / "target") -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main(["to-dense", str(source), str(target)]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and words in error, error
        assert sorted(tmp_path.rglob("*")) == before

    refused("there is no folder", tmp_path / "nowhere")
    place = checkpoint(tmp_path / "whole")
    refused("exists, and is left as it is", place, place)
    files = sorted(place.iterdir())
    files[1].rename(place / "mp_rank_02_model_states.pt")
    refused("the file of mp_rank_01 is missing", place)
    (place / "mp_rank_02_model_states.pt").unlink()
    refused("is one of 2 tensor-parallel ranks, but there are files of 1", place)
    files[0].write_bytes(files[0].read_bytes()[:500])
    refused("mp_rank_00_model_states.pt cannot be read, is it whole?", place.parent)
    files[0].rename(place / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused("partitioned by ZeRO-3", place)
    (place.parent / "latest").write_text("global_step4")
    refused("latest names global_step4, and there is no such checkpoint", place.parent)
    refused("has no tile keys", checkpoint(tmp_path / "dense", tiles=False))


def test_only_plain_arguments_are_kept(tmp_path: Path) -> None:
    place = checkpoint(tmp_path)
    convert(place.parent, tmp_path / "dense")
    assert (tmp_path / "dense" / "latest_checkpointed_iteration.txt").read_text() == "3"
    content = torch.load(tmp_path / "dense" / "iter_0000003" / "mp_rank_01" / "model_optim_rng.pt")  # as stock does
    assert vars(content["args"]) == {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    assert torch.equal(content["model"][f"{LAYER}.weight"], torch.ones(4, 4))


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    assert re.search("tile keys and dense Megatron keys", capsys.readouterr().out)

"""Checkpoints with tile keys to dense ones and back: refusals, and whole models of DeepSpeed's and Megatron's."""

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tiling.convert_deepspeed import convert, main
from megatron_tiling.tiles import deepspeed_keys
from tests.support.launch import ROOT, torchrun

LAYER = "decoder.layers.0.mlp.linear_fc1"


@pytest.mark.feature("DeepSpeed's tile keys to dense and back")
def test_models_there_and_back(tmp_path: Path) -> None:
    output = torchrun(ROOT / "tests" / "check_convert_deepspeed.py", tmp_path, world=2)
    assert "converted a GPT there and back" in output and "converted a Llama there and back" in output


def checkpoint(folder: Path, ranks: int = 2, tiles: bool = True) -> Path:
    """Files as DeepSpeed's engine names them, of one layer."""
    place = folder / "saved" / "global_step3"
    place.mkdir(parents=True)
    (folder / "saved" / "latest").write_text("global_step3")
    state = {f"{LAYER}.weight": torch.ones(4, 4)}
    for rank in range(ranks):
        module = deepspeed_keys.split_tiles(state, {"fc1": (1, 2)} if tiles else {}, ranks)
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
    twice = checkpoint(tmp_path / "twice")
    (twice / "mp_rank_01").mkdir()
    refused("are of the same rank: keep one of them", twice)
    two = checkpoint(tmp_path / "two").parent
    (two / "global_step2").mkdir()
    (two / "latest_checkpointed_iteration.txt").write_text("2")
    refused("latest_checkpointed_iteration.txt names global_step2: give one", two)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: str, **changes: Any) -> None:
        """Rank 1's file with other content, or none."""
        source, target = tmp_path / words.replace("/", " "), tmp_path / "new" / "target"
        file = checkpoint(source) / "mp_rank_01_model_states.pt"
        content = torch.load(file, weights_only=False)
        torch.save({key: value for key, value in (content | changes).items() if value != "left out"}, file)
        assert main(["to-dense", str(source / "saved"), str(target)]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and words in error, error
        assert not target.parent.exists()

    def tiles(splits: dict[str, tuple[int, int]], weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return deepspeed_keys.split_tiles({f"{LAYER}.weight": weight}, splits, 2)

    grid, weight = {"fc1": (1, 2)}, torch.ones(4, 4)
    refused("are not of one checkpoint: iteration is 3 and 4", global_steps=4)
    refused("its iteration is 'three', not a number of steps", iteration="three")
    refused("is one of 4 tensor-parallel ranks, but there are files of 2", mp_world_size=4)
    refused("is one of 3 tensor-parallel ranks", args=Namespace(tensor_model_parallel_size=3))
    refused(
        "linears.0.0.weight is [2, 4] of torch.float32 and [1, 4] of torch.float32",
        module=tiles({"fc1": (1, 4)}, weight),
    )
    refused("[2, 4] of torch.float32 and [2, 4] of torch.bfloat16", module=tiles(grid, weight.bfloat16()))
    refused("has no tile keys", module={f"{LAYER}.weight": weight})
    refused(
        "mlp.router.weight is missing and", module=tiles(grid, weight) | {"decoder.layers.0.mlp.router.weight": weight}
    )
    refused("is there twice", module=tiles(grid, weight) | {f"{LAYER}": {"linears.0.0.weight": weight}})
    refused("holds no 'module'", module="left out")


def test_an_iteration_that_is_none_or_absent(tmp_path: Path) -> None:
    """Megatron-DeepSpeed's files have an iteration, DeepSpeed's own ``global_steps``; either may be None."""
    place = checkpoint(tmp_path)
    for file in place.iterdir():
        torch.save(torch.load(file, weights_only=False) | {"iteration": None}, file)
    convert(place.parent, tmp_path / "dense")
    assert (tmp_path / "dense" / "latest_checkpointed_iteration.txt").read_text() == "3"


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

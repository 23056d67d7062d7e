"""A checkpoint of DeepSpeed's engine that this run cannot continue is refused before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Linear, Sequential

from megatron_tiling.zero3 import checkpoint_check

SHAPES = {"0.weight": (3, 2), "0.bias": (3,)}


def engine(module: torch.nn.Module | None = None, data: int = 1, tensor: int = 1) -> Any:
    """What is asked of DeepSpeed's engine, on its first rank."""

    def file(folder: str, tag: str) -> str:
        return f"{folder}/{tag}/zero_pp_rank_0_mp_rank_00_model_states.pt"

    module = Sequential(Linear(2, 3)) if module is None else module
    return SimpleNamespace(module=module, dp_world_size=data, mp_world_size=tensor, _get_ckpt_name=file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved = {"dp_world_size": 1, "mp_world_size": 1, "param_shapes": [SHAPES], "global_steps": 7}
    torch.save(saved, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return tmp_path


def check(engine: Any, folder: Path) -> int:
    return checkpoint_check._check(engine, folder.parent, folder.name)


def test_a_checkpoint_of_this_engine_passes(folder: Path) -> None:
    assert check(engine(), folder) == 7


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (engine(data=2), "saved by 1 data-parallel ranks, and this run has 2"),
        (engine(tensor=4), "saved by 1 tensor-parallel ranks, and this run has 4"),
        (engine(Sequential(Linear(2, 4))), r"0.weight is \[3, 2\] there and \[4, 2\] here"),
        (engine(Linear(2, 3)), r"0.weight is \[3, 2\] there and missing"),
    ],
)
def test_another_engine_is_refused(other: Any, words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        check(other, folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_lost_file_is_named(kind: str, folder: Path) -> None:
    (file,) = folder.glob(f"*_{kind}_states.pt")
    file.unlink()
    with pytest.raises(ValueError, match=f"{kind}_states.pt"):
        check(engine(), folder)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_file_that_is_cut_off_is_named(kind: str, folder: Path) -> None:
    (file,) = folder.glob(f"*_{kind}_states.pt")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read") as refusal:
        check(engine(), folder)
    assert "\n" not in str(refusal.value)


def test_a_file_of_something_else_is_named(folder: Path) -> None:
    (file,) = folder.glob("*_model_states.pt")
    torch.save([1], file)
    with pytest.raises(ValueError, match=f"{file.name} was not saved by a ZeRO-3 engine"):
        check(engine(), folder)


def test_latest_that_names_nothing(folder: Path) -> None:
    (folder / "latest").write_text("iter_0000009\n")
    tag = checkpoint_check._tag_in(folder)
    assert tag == "iter_0000009" and checkpoint_check._tag_in(folder / "empty") is None
    with pytest.raises(ValueError, match=r"iter_0000009, the checkpoint that .*latest"):
        check(engine(), folder / tag)


def test_partitions_of_other_tiles_are_refused_strictly_or_not() -> None:
    """The engine saves an empty tensor for what it has partitioned, and loads flat partitions after the module."""
    model = Sequential(Linear(2, 3, bias=False), Linear(3, 2, bias=False))
    checkpoint_check.refuse_other_tiles(model)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(whole)
    model.load_state_dict({"0.weight": whole["0.weight"]}, strict=False)
    for saved in ({"0.weight": torch.empty(0)}, dict.fromkeys(("0.weight", "1.weight", "2.weight"), torch.empty(0))):
        with pytest.raises(RuntimeError, match=r"saved with other tiles: [12].weight is"):
            model.load_state_dict(saved, strict=False)

"""A checkpoint of DeepSpeed's engine that this run cannot continue is refused before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Linear, Sequential

from megatron_tiling.zero3 import resume as zero3_resume

SHAPES = {"0.weight": (3, 2), "0.bias": (3,)}


def engine(shape: tuple[int, int] = (2, 3), data: int = 1, tensor: int = 1) -> Any:
    return SimpleNamespace(module=Sequential(Linear(*shape)), dp_world_size=data, mp_world_size=tensor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved = {"dp_world_size": 1, "mp_world_size": 1, "param_shapes": [SHAPES], "frozen_param_shapes": None}
    torch.save(saved, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return tmp_path


def test_a_checkpoint_of_this_engine_passes(folder: Path) -> None:
    zero3_resume._check(engine(), folder)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (engine(data=2), "saved by 1 data-parallel ranks, and this run has 2"),
        (engine(tensor=4), "saved by 1 tensor-parallel ranks, and this run has 4"),
        (engine(shape=(2, 4)), r"0.weight is \[3, 2\] there and \[4, 2\] here"),
        (
            SimpleNamespace(module=Linear(2, 3), dp_world_size=1, mp_world_size=1),
            r"0.weight is \[3, 2\] there and miss",
        ),
    ],
)
def test_another_engine_is_refused(other: Any, words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        zero3_resume._check(other, folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_lost_file_is_named(kind: str, folder: Path) -> None:
    (file,) = folder.glob(f"*_{kind}_states.pt")
    file.unlink()
    with pytest.raises(ValueError, match=f"{kind}_states.pt"):
        zero3_resume._check(engine(), folder)


def test_a_file_that_is_cut_off_is_named(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
        zero3_resume._check(engine(), folder)


def test_latest_that_names_nothing(folder: Path) -> None:
    (folder / "latest").write_text("iter_0000009\n")
    tag = zero3_resume._tag_in(folder)
    assert tag == "iter_0000009" and zero3_resume._tag_in(folder / "empty") is None
    with pytest.raises(ValueError, match=r"iter_0000009, the checkpoint that .*latest"):
        zero3_resume._check(engine(), folder / tag)

"""Checkpoints that cannot be loaded: one line, and nothing of them touched."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_tiling.trainer.checkpoint_check import TRACKER, CheckpointError, Found, find_checkpoint
from tests.support.launch import ROOT, torchrun

ARGS = Namespace(ckpt_step=None, ckpt_format="torch_dist", auto_detect_ckpt_format=False)


def test_bad_checkpoints_end_a_run_with_one_line(tmp_path: Path) -> None:
    output = torchrun(ROOT / "tests" / "trainer" / "check_checkpoint_check.py", tmp_path, world=2)
    assert "16 bad checkpoints refused" in output


def test_where_stock_starts_from_random_weights_there_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(ARGS, None) is None
    assert find_checkpoint(ARGS, str(tmp_path / "nowhere")) is None
    assert find_checkpoint(ARGS, str(tmp_path)) is None


@pytest.mark.parametrize(("tracker", "name"), [("release", "release"), ("70\n", "iter_0000070")])
def test_the_tracker_names_the_folder(tmp_path: Path, tracker: str, name: str) -> None:
    (tmp_path / TRACKER).write_text(tracker)
    with pytest.raises(CheckpointError, match=f"there is no .*{name}"):
        find_checkpoint(ARGS, str(tmp_path))
    (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    assert find_checkpoint(ARGS, str(tmp_path)) == Found(tmp_path / name, legacy=True)

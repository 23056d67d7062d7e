"""Checkpoints that cannot be loaded: one line, and nothing of them touched."""

from pathlib import Path

from tests.support.launch import ROOT, torchrun


def test_bad_checkpoints_end_a_run_with_one_line(tmp_path: Path) -> None:
    output = torchrun(ROOT / "tests" / "trainer" / "check_checkpoint_check.py", tmp_path, world=2)
    assert "14 bad checkpoints refused" in output

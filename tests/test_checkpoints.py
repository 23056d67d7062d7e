"""Tiling never shows in a checkpoint."""

import subprocess
import sys
from pathlib import Path

from launch import torchrun
from test_training import HERE, SCRIPTS


def test_entries_and_optimizer_state(tmp_path: Path) -> None:
    output = torchrun(HERE / "distributed" / "check_checkpoints.py", tmp_path, world=2)
    assert all(f"checkpoint checks passed at TP={tp}" in output for tp in (1, 2))


def test_script_can_be_imported_by_the_processes_that_write_a_checkpoint() -> None:
    script = SCRIPTS / "pretrain_gpt.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__mp_main__')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

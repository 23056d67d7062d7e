"""What the scripts in tools/ say to arguments that they cannot follow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT

READY = "touch .venv/.ready-$({ pwd; cat pyproject.toml tools/constraints.txt; } | cksum | tr ' ' -)"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("lint.sh tests", "lint.sh: tests: it takes no arguments, and checks everything"),
        ("setup.sh 2.10 newest", "setup: newest: it takes one argument, a version of torch"),
    ],
)
def test_more_arguments_than_are_read(command: str, words: str) -> None:
    ended = subprocess.run(["bash", *f"{ROOT}/tools/{command}".split()], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"{words}\n")


def test_another_python_than_that_of_the_environment_is_said(tmp_path: Path) -> None:
    for file in ("pyproject.toml", "tools/constraints.txt", "tools/setup.sh"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    subprocess.run(["bash", "-c", READY], check=True, cwd=tmp_path)
    for python, said in ((sys.executable, False), ("/nowhere/python", True)):
        environment = os.environ | {"PYTHON": python}
        command = ["bash", str(tmp_path / "tools" / "setup.sh")]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert ended.returncode == 0 and ("PYTHON=/nowhere/python has no effect; remove .venv" in ended.stderr) == said

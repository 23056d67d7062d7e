"""The planner's TransformerEngine keeps and makes what the real one does."""

import subprocess
import sys

import pytest

from tests.plan.transformer_engine_checks import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_transformer_engine(check: str) -> None:
    command = [sys.executable, "-m", "tests.plan.transformer_engine_checks", check]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

"""Models whose tiles are parameters, in their own process groups: see distributed/check_partitioned.py."""

from pathlib import Path

import pytest
from launch import torchrun

SCRIPT = Path(__file__).parent / "distributed" / "check_partitioned.py"


@pytest.mark.feature("whole models, tiles as parameters, TP=2")
def test_equals_dense() -> None:
    assert "checks of partitioned models passed" in torchrun(SCRIPT, world=4)

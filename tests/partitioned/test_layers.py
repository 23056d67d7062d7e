"""Models whose tiles are parameters, in their own process groups: see check_layers.py."""

from pathlib import Path

import pytest

from tests.support.launch import torchrun

SCRIPT = Path(__file__).with_name("check_layers.py")


@pytest.mark.feature("whole models, tiles as parameters, TP=2")
def test_equals_dense() -> None:
    assert "checks of partitioned models passed" in torchrun(SCRIPT, world=4)

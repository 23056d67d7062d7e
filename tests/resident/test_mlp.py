"""TiledMLP under tensor and sequence parallelism, in its own process groups: see check_mlp.py."""

from pathlib import Path

import pytest

from tests.support.launch import torchrun

SCRIPT = Path(__file__).with_name("check_mlp.py")


@pytest.mark.parametrize("world", [2])
def test_equals_stock(world: int) -> None:
    assert f"cases passed at TP={world}" in torchrun(SCRIPT, world=world)

"""The tiled layers against the stock ones, in their own process groups: see check_layers.py."""

from pathlib import Path

import pytest

from tests.support.launch import torchrun

SCRIPTS = Path(__file__).parent


@pytest.mark.feature("layers, TP={world}")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_option_equals_stock(world: int) -> None:
    assert f"cases passed at TP={world}" in torchrun(SCRIPTS / "check_layers.py", world=world)

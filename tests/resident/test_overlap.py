"""TiledMLP with communication behind products, in its own process groups: see check_overlap.py."""

import pytest

from tests.support.launch import torchrun


@pytest.mark.feature("TiledMLP with communication behind products, TP={world}")
@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_as_blocking_collectives(world: int) -> None:
    assert f"cases passed at TP={world}" in torchrun("-m", "tests.resident.check_overlap", world=world)

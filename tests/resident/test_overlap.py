"""Communication behind products, in process groups of its own: see check_overlap.py and check_stepped.py."""

import pytest

from tests.support.launch import torchrun


@pytest.mark.feature("TiledMLP with communication behind products, TP={world}")
@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_as_blocking_collectives(world: int) -> None:
    assert f"cases passed at TP={world}" in torchrun("-m", "tests.resident.check_overlap", world=world)


@pytest.mark.feature("qkv, proj and the LM head with communication behind products, TP={world}")
@pytest.mark.parametrize("world", [2, 4])
def test_column_and_row_layers(world: int) -> None:
    assert f"cases passed at TP={world}" in torchrun("-m", "tests.resident.check_stepped", world=world)

"""Whole models, dense against tiled: see check_models.py."""

from pathlib import Path

import pytest

from tests.support.launch import torchrun

SCRIPTS = Path(__file__).parent


@pytest.mark.feature("whole models, TP={world}")
@pytest.mark.parametrize("world", [1, 2])
def test_models_equal_dense(world: int) -> None:
    assert f"model checks passed at TP={world}" in torchrun(SCRIPTS / "check_models.py", world=world)

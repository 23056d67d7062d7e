"""The tiled LM head inside stock models, under torchrun."""

from pathlib import Path

import pytest

from tests.support.launch import torchrun

SCRIPT = Path(__file__).with_name("check_lm_head.py")


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_stock_model_trains_alike(tensor_parallel):
    assert "tiled equals stock" in torchrun(SCRIPT, world=tensor_parallel)

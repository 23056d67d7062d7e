"""Log-probabilities and entropies in slime, miles and verl: their own functions, on dense logits and on tiled models.

verl is installed by ``tools/test_integrations.sh``; slime and miles are no packages: ``SLIME_SOURCE`` and
``MILES_SOURCE`` are folders that hold their modules.
"""

import importlib.util
import os

import pytest

from megatron_tiling.config import VARIABLE
from tests.support.launch import search_path, torchrun

MODULE = "tests.integrations.check_scores"


@pytest.mark.feature(
    "verl: log-probabilities and entropies of its fused forward pass, gradients too, within 1e-10 in float64",
    page="integrations",
)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl: tools/test_integrations.sh installs it")
def test_verl(size: int) -> None:
    """Its fused forward pass, with the hooked function and with the function's formula."""
    settings = {VARIABLE: "factor=3 modules=output splits=output=1x3 head_tokens=5"}
    assert f"verl passed at TP={size}" in torchrun("-m", MODULE, "verl", world=size, environment=settings)


@pytest.mark.feature(
    "{trainer}: `get_log_probs_and_entropy` of packed samples: values within 5e-6, gradients to rounding",
    page="integrations",
)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("trainer", ["slime", "miles"])
def test_slime_and_miles(trainer: str, size: int) -> None:
    """``get_log_probs_and_entropy`` of two packed samples, with what else is asked of logits."""
    source = os.environ.get(f"{trainer.upper()}_SOURCE")
    if source is None:
        pytest.skip(f"{trainer.upper()}_SOURCE is not set")
    settings = {"PYTHONPATH": search_path(source)}
    output = torchrun("-m", MODULE, trainer, world=size, environment=settings)
    assert f"{trainer} passed at TP={size}" in output

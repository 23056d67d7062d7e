"""Grouped experts, stock and tiled, on stand-ins for TransformerEngine's layers: see check_experts.py."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.launch import ROOT, search_path, torchrun
from tests.support.megatron_lm import VERSIONS, Version, unpacked_wheel

SCRIPT = Path(__file__).with_name("check_experts.py")
LAYOUTS = ("EP=2", "expert TP=2", "alone")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine itself is installed"
)


@pytest.fixture(scope="module", params=(VERSIONS[0], VERSIONS[-1]), ids=lambda version: version.wheel)
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the checks with that version, whose name it begins with."""
    version: Version = request.param
    wheel = unpacked_wheel(version, tmp_path_factory.mktemp(version.wheel))
    path = search_path(ROOT / "tests" / "stand_ins", wheel)
    return f"{version.wheel}\n{torchrun(SCRIPT, world=2, environment={'PYTHONPATH': path})}"


@pytest.mark.feature("grouped experts, {layout}", version="{output.wheel}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_stock(layout: str, output: str) -> None:
    version, *_ = output.splitlines()
    assert f"experts, {layout}: checks passed on megatron-core {version}" in output, output[-6000:]


def test_stocks_own_grouped_mlp(output: str) -> None:
    """In 0.16 alone."""
    assert ("GroupedMLP: as stock" in output) == output.startswith("0.16")

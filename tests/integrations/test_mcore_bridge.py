"""mcore-bridge, as ms-swift uses it, on tiled models; ``tools/test_integrations.sh`` installs it."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.launch import ROOT, search_path, torchrun


@pytest.mark.feature(
    "ms-swift: models of mcore-bridge, Llama and Qwen3: loaded, export equal to the last bit; LoRA of peft in the tile "
    "loop; loss within 1e-6, gradients within 1e-5",
    page="integrations",
)
@pytest.mark.skipif(
    importlib.util.find_spec("mcore_bridge") is None,
    reason="mcore-bridge is not installed: tools/test_integrations.sh does",
)
def test_mcore_bridge(tmp_path: Path) -> None:
    """Loads, exports, a step and LoRA, tiled by the plugin, at TP=1 and TP=2 with sequence parallelism."""
    path = search_path(ROOT / "tests" / "stand_ins")
    module = "tests.integrations.check_mcore_bridge"
    output = torchrun("-m", module, tmp_path, world=2, environment={"PYTHONPATH": path})
    for size in (1, 2):
        assert f"mcore-bridge passed at TP={size}" in output, output[-6000:]

"""Megatron-Bridge on tiled models; ``tools/test_integrations.sh`` installs it."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.launch import ROOT, search_path, torchrun

HAS_BRIDGE = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None
)


@pytest.mark.skipif(not HAS_BRIDGE, reason="Megatron-Bridge is not installed: tools/test_integrations.sh does")
def test_bridge(tmp_path: Path) -> None:
    """Loads, exports and adapters, at TP=1 and TP=2 with sequence parallelism."""
    path = search_path(ROOT / "tests" / "stand_ins")
    output = torchrun("-m", "tests.integrations.check_bridge", tmp_path, world=2, environment={"PYTHONPATH": path})
    for check in ("models", "adapters", "lora_in_the_loop", "memory_of_lora", "what_leaves_the_loop", "providers"):
        for size in (1, 2):
            assert f"check_{check} passed at TP={size}" in output, output[-6000:]

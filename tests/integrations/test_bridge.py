"""Megatron-Bridge on tiled models; ``tools/test_integrations.sh`` installs it."""

import importlib.util

import pytest

from tests.support.launch import ROOT, search_path, torchrun

HAS_BRIDGE = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None
)
pytestmark = pytest.mark.skipif(not HAS_BRIDGE, reason="Megatron-Bridge: tools/test_integrations.sh installs it")
CHECKS = {
    "models": "Llama, Qwen2 tied, Qwen3, Qwen3 experts sequential and grouped: loaded before and after tiling; loss "
    "within 1e-6, gradients within 5e-6, export equal to the last bit",
    "adapters": "LoRA, DoRA, CanonicalLoRA on Llama, LoRA on Qwen2 tied and on Qwen3 experts, before and after tiling: "
    "loss within 1e-6, gradients within 1e-5; LoRA merged, equal to the last bit",
    "lora_in_the_loop": "LoRA of fc1, fc2 or both in the tile loop, keep 0, 1 and all, weights frozen or not: "
    "within 1e-12 in float64",
    "memory_of_lora": "an MLP with LoRA, frozen: below 0.6 of stock's bytes with keep all, 0.45 with keep 0",
    "what_leaves_the_loop": "LoRA with dropout, hooks, all-to-all, switched off: runs by itself on tiled layers",
    "providers": "`tile_provider`: once, one config, resident",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = search_path(ROOT / "tests" / "stand_ins")
    folder = tmp_path_factory.mktemp("bridge")
    return torchrun("-m", "tests.integrations.check_bridge", folder, world=2, environment={"PYTHONPATH": path})


@pytest.mark.feature("Megatron-Bridge: {feature}", page="integrations")
@pytest.mark.parametrize(("check", "feature"), CHECKS.items(), ids=CHECKS)
def test_bridge(output: str, check: str, feature: str) -> None:
    """At TP=1, and at TP=2 with sequence parallelism."""
    for size in (1, 2):
        assert f"check_{check} passed at TP={size}" in output, output[-6000:]

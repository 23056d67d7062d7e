"""examples/bridge/finetune.py: Megatron-Bridge's own trainer, from a Hugging Face model to a Hugging Face model."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launch import ROOT, search_path, torchrun

HAS_BRIDGE = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None
)
pytestmark = pytest.mark.skipif(not HAS_BRIDGE, reason="Megatron-Bridge: tools/test_integrations.sh installs it")
STEPS = "--float32 --backend gloo --iterations 4 --optimizer sgd --lr 1"  # Adam makes steps of gradients that are zero
TILED = "--tile-factor 3 --tile-keep 0"
LORA = "--lora-rank 4"


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    return found


def tune(folder: Path, name: str, flags: str, world: int) -> list[float]:
    start = f"--hf {folder / 'dense-start'}" if (folder / "dense-start").exists() else ""
    arguments = f"{STEPS} {flags} --save {folder / name} {start}".split()
    script = ROOT / "examples" / "bridge" / "finetune.py"
    environment = {"PYTHONPATH": search_path(ROOT / "tests" / "stand_ins")}
    launcher = ROOT / "tests" / "integrations" / "bridge_on_cpu.py"
    output = torchrun(launcher, script, *arguments, world=world, environment=environment)
    assert ("TiledMLP, keep 0" in output) == ("--tile-factor" in flags), output[-6000:]
    return losses(output)


def test_kept_tiles_of_no_tiles(tmp_path: Path) -> None:
    launcher, script = (
        ROOT / folder for folder in ("tests/integrations/bridge_on_cpu.py", "examples/bridge/finetune.py")
    )
    environment = os.environ | {"PYTHONPATH": search_path(ROOT / "tests" / "stand_ins")}
    command = [sys.executable, launcher, script, "--save", tmp_path, "--tile-keep", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode and "--tile-keep 0 does nothing without --tile-factor" in ended.stderr, ended.stderr


@pytest.mark.feature(
    "Megatron-Bridge: `finetune()` from a Hugging Face model to one, all weights and LoRA: logits within 2e-5",
    page="integrations",
)
def test_exported_models_equal_dense_ones(tmp_path: Path) -> None:
    """All weights, on two ranks and on one; LoRA, merged; both leave the model that they start from."""
    for dense, tiled, flags, world in (("dense", "tiled", "", 2), ("dense-lora", "tiled-lora", LORA, 1)):
        expected = tune(tmp_path, dense, flags, world=1)
        found = tune(tmp_path, tiled, f"{flags} {TILED}", world=world)
        assert len(expected) == 4 and torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=2e-6)
        start, wanted, got = (logits(tmp_path / name) for name in ("dense-start", dense, tiled))
        assert float((wanted - start).norm() / start.norm()) > 0.1
        assert float((got - wanted).norm() / wanted.norm()) < 2e-5

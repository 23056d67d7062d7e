"""The real TransformerEngine without a GPU: its models are built, tiled, saved and loaded."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.launch import ROOT, empty_driver

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None or torch.cuda.is_available() or shutil.which("cc") is None,
    reason="needs TransformerEngine, a C compiler and no GPU",
)
NAMES = (
    "Llama",
    "GPT with biases, tied",
    "QK norms",
    "next-token heads",
    "sequential and shared experts",
    "grouped and shared experts",
    "multi-latent attention",
    "checkpoints",
    "reasons",
    "FP8",
    "norms",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = empty_driver(tmp_path_factory.mktemp("driver"))
    command = [sys.executable, "-m", "tests.resident.check_transformer_engine_cpu", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr


@pytest.mark.feature("on the real TransformerEngine without a GPU: {name}")
@pytest.mark.parametrize("name", NAMES)
def test_as_dense(name: str, output: str) -> None:
    assert f"{name}: as " in output, output[-6000:]


def test_that_is_all(output: str) -> None:
    assert output.count(": as ") == len(NAMES) and ": checks passed\n" in output, output[-6000:]

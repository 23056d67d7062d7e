"""The FP8 tile loop without a GPU: TransformerEngine's quantizers and GEMM are done in torch."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.launch import empty_driver, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None or torch.cuda.is_available() or shutil.which("cc") is None,
    reason="needs TransformerEngine, a C compiler and no GPU",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_against_float64(ranks: int, tmp_path: Path) -> None:
    output = torchrun("-m", "tests.resident.check_fp8_cpu", empty_driver(tmp_path), world=ranks)
    assert f"on {ranks} ranks: ok" in output, output[-6000:]


def test_experts_as_transformer_engines(tmp_path: Path) -> None:
    output = torchrun("-m", "tests.resident.check_fp8_experts_cpu", empty_driver(tmp_path), world=1)
    assert "check_fp8_experts_cpu: " in output and "cases: ok" in output, output[-6000:]

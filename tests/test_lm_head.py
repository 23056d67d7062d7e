"""The tiled LM head inside stock models (under torchrun), and what convert_head refuses or leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_stock_model_trains_alike(tensor_parallel):
    script = HERE / "distributed" / "check_lm_head.py"
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node", str(tensor_parallel), str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=HERE.parent,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "tiled equals stock" in run.stdout

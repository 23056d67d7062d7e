"""``plan --measure`` on GPUs: what it prints of runs that fit, of one that does not, and the rates that it times."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tiling.plan import rates
from megatron_tiling.plan.clock import useful_share
from tests.support.launch import EXAMPLES, ROOT, search_path

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(
    not GPUS or importlib.util.find_spec("transformer_engine") is None, reason="needs a GPU and TransformerEngine"
)
MODEL = """
    --num-layers 2 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16 --lr 1e-4 --train-iters 50
    --eval-interval 1000000 --eval-iters 0 --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer
    --log-interval 1 --attention-backend unfused --no-create-attention-mask-in-dataloader --use-tiled-linear
"""
#: A GPU of so many GiB, in measured runs alone.
CAPPED = """
import os, runpy, torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction({gib} * 2**30 / total)
runpy.run_path({script!r}, run_name="__main__")
"""


def measure(script: Path, flags: str, *options: str) -> dict[str, list[str]]:
    """Rows of the table of what was measured, by their names; "" has what is printed."""
    arguments = [*MODEL.split(), *flags.split()]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tiling", "plan", "--measure", *options, str(script), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": search_path()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout)
    found: dict[str, list[str]] = {"": [done.stdout]}
    before = ""
    for line in done.stdout.partition("MiB, measured")[2].splitlines()[1:11]:
        name, *cells = re.split(r" {2,}", line.strip())
        name = f"{before}, planned" if name.startswith("planned") else name
        found[name], before = cells, name
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_plan_and_measurement_stand_side_by_side(tp: int, tmp_path: Path) -> None:
    if tp > GPUS:
        pytest.skip(f"needs {tp} GPUs")
    picture = tmp_path / "step.png"
    saved = tmp_path / "saved"
    flags = (
        "--seq-length 2048 --max-position-embeddings 2048 --vocab-size 32000 --global-batch-size 2 --save-interval 1 "
        f"--save {saved} --tensor-model-parallel-size {tp}" + " --sequence-parallel" * (tp > 1)
    )
    draws = importlib.util.find_spec("matplotlib") is not None
    found = measure(EXAMPLES / "pretrain_gpt.py", flags, *(["--picture", str(picture)] if draws else []))
    for measured, planned in zip(found["peak"], found["peak, planned"], strict=True):
        assert int(planned.split()[0]) == pytest.approx(int(measured), rel=0.02)
    assert "timed now" in found[""][0] and "not timed" not in found[""][0]
    assert all(float(milliseconds) > 0 for milliseconds in found["milliseconds of a step"])
    assert not saved.exists()
    assert picture.exists() == draws


def test_dense_does_not_fit_and_tiled_does(tmp_path: Path) -> None:
    script = tmp_path / "capped.py"
    script.write_text(CAPPED.format(gib=6, script=str(EXAMPLES / "pretrain_gpt.py")))
    flags = (
        "--seq-length 8192 --max-position-embeddings 8192 --vocab-size 128000 --global-batch-size 1 "
        "--hidden-size 512 --num-attention-heads 4 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --attention-backend flash"
    )
    found = measure(script, flags)
    assert found["peak"][0] == "out of memory" and found["peak"][1].isdigit(), found
    assert re.search("^dense: out of memory in logits and loss", found[""][0], re.M)


def test_rates_give_the_time_of_a_product_that_was_not_timed() -> None:
    bandwidth = rates.bandwidth()
    rates.warm_up()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    times = {shape: rates.product_seconds(shape) for shape in rates.PRODUCTS}
    products, share, error = rates.fitted(times, processors, bandwidth)
    assert error < 0.5, times
    shape = rates.TOKENS, 5120, 10240
    expected = 2.0 * math.prod(shape) / useful_share(shape[0], shape[2], 1, processors) / products
    expected += share * rates.traffic(shape) / bandwidth
    assert rates.product_seconds(shape) == pytest.approx(expected, rel=0.2)

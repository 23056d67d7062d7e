"""Fake tensors and fake ranks against real ones, on the CPU; the comparison with GPUs is in benchmarks/results."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.plan.check_fake import MODELS
from tests.support.launch import ENVIRONMENT, ROOT, search_path, torchrun


def seen(output: str) -> dict[tuple[str, str], Any]:
    lines = [json.loads(line.removeprefix("SEEN ")) for line in output.splitlines() if line.startswith("SEEN ")]
    return {(name, tensors): found for name, tensors, found in lines}


def test_fake_tensors_need_what_real_tensors_need() -> None:
    command = [sys.executable, "-m", "tests.plan.check_fake"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": search_path()}
    one = seen(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout)
    two = seen(torchrun("-m", "tests.plan.check_fake", world=2))
    for name in MODELS:
        fake, over_gloo = one[name, "fake"], two[name, "real"]
        assert fake == one[name, "real"], name
        assert {key: fake[key] for key in ("model", "flops")} == {key: over_gloo[key] for key in ("model", "flops")}
        assert fake["peak"] <= over_gloo["peak"] <= 1.1 * fake["peak"], name
    assert one["tiled, keep 0", "fake"]["peak"] < one["tiled", "fake"]["peak"]
    assert one["dense, recompute", "fake"]["flops"] > one["dense", "fake"]["flops"]


def test_steps_that_were_measured_on_an_h100() -> None:
    """benchmarks/results/2026-11-22-end-to-end.md: MiB that Megatron logged, and phases that its text gives."""
    planned = subprocess.run(
        [sys.executable, "-m", "tests.plan.measured"], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search_path(), "CUDA_VISIBLE_DEVICES": ""},
    ).stdout  # fmt: skip
    assert [line for line in planned.splitlines() if line.startswith("MEASURED")] == [
        "MEASURED 40463 planned 40463, attention, backward; 80.66 TFLOP",
        "MEASURED 38783 planned 38783, attention, backward; 92.20 TFLOP",
    ]

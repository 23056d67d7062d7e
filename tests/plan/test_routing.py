"""Rows of experts: as stated, where Megatron would read values; and fake experts beside real ones."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiling.plan.routing import Routing, evenly
from tests.plan.check_experts import MODELS
from tests.support.launch import ENVIRONMENT, ROOT, search_path, torchrun

#: Bytes of counts that stock keeps on a GPU or a host, of two layers, in blocks of 512.
COUNTS = 8192


def routing(imbalance: float, experts: int, top_k: int, local: int) -> Routing:
    found = Routing(imbalance)
    found.read(SimpleNamespace(num_moe_experts=experts, moe_router_topk=top_k), local)
    return found


def test_rows() -> None:
    assert evenly(10, 4).tolist() == [3, 3, 2, 2] and evenly(3, 2, 2).tolist() == [[1, 1], [1, 0]]
    assert routing(1.0, 8, 2, 2).rows(100, 2) == 50
    assert routing(1.5, 8, 2, 2).rows(100, 2) == 75
    assert routing(1.5, 8, 2, 2).rows(100, 8) == 200  # of all ranks together
    assert routing(4.0, 8, 2, 2).rows(100, 2) == 200
    assert routing(2.0, 4, 2, 1).rows(100, 1) == 100  # each token once


@pytest.mark.parametrize(("imbalance", "local", "most"), [(4.5, 2, "4"), (0.5, 2, "4"), (1.1, 8, "1"), (9, 1, "4")])
def test_rows_that_cannot_be(imbalance: float, local: int, most: str) -> None:
    with pytest.raises(SystemExit, match=f"--expert-imbalance {imbalance:g}: .* has 1 to {most} times"):
        routing(imbalance, 8, 2, local)


def seen(output: str) -> dict[str, Any]:
    lines = [json.loads(line.removeprefix("SEEN ")) for line in output.splitlines() if line.startswith("SEEN ")]
    return {name: found for name, _, found in lines}


def test_fake_experts_need_what_real_experts_need() -> None:
    command = [sys.executable, "-m", "tests.plan.check_experts"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": search_path()}
    planned = seen(
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    )
    real = seen(torchrun("-m", "tests.plan.check_experts", world=2))
    for name in MODELS:
        fake, true = planned[name], real[name]
        assert (fake["model"], fake["flops"]) == (true["model"], true["flops"]), name
        # Threads of gloo hold tensors longer than an exchange takes, now and then.
        transients = sum(size for part, size in fake["parts"].items() if part.startswith("transients"))
        held = 0 if name.startswith("alone") else transients
        for key in ("peak", "left"):
            assert 0 <= true[key] - fake[key] <= COUNTS + held, (name, key)
        if not held:
            assert fake["phase"] == true["phase"], name

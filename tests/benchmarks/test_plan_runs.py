"""Measured runs beside the planner: the phase of a peak, and the page."""

import dataclasses
import json
from typing import Any

import pytest

from benchmarks.plan_runs import CASES, Case, page

ORIGIN = {"date": "2000-01-01", "command": "command", "machine": "GPU", "versions": {"torch": "2"}}


def test_names_are_not_given_twice() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("flags", "gpus", "batch"),
    [("", 1, 2), ("--tensor-model-parallel-size 2", 2, 2), ("--tensor-model-parallel-size 2", 4, 4)],
)
def test_batch_of_each_data_parallel_rank(flags: str, gpus: int, batch: int) -> None:
    arguments = Case("name", gpus, 1, 8, flags).arguments()
    assert arguments[arguments.index("--global-batch-size") + 1] == str(batch)


def rank(peak: int, phase: str) -> dict[str, Any]:
    return {"peak": peak * 2**20, "phase": phase, "reserved": peak * 2**20 * 5 // 4}


def test_page_holds_the_fullest_rank_and_errors() -> None:
    runs = [dataclasses.asdict(case) for case in CASES[:4]]
    runs[0] |= {"ranks": [rank(100, "MLP"), rank(200, "experts")]}
    runs[1] |= {"ranks": [rank(100, "MLP")]}
    runs[2] |= {"error": "out of memory"}
    runs[3] |= {"ranks": [rank(50, "MLP")]}
    text = page(json.loads(json.dumps({"origin": ORIGIN, "runs": runs})), [
        (202 * 2**20, "experts"), (95 * 2**20, "attention"), (1, "MLP"), "a warning\nrefused: --fp8",
    ])  # fmt: skip
    assert "| 200 | experts | 250 | 202 | experts | +1.00% |" in text
    assert "| 100 | MLP | 125 | 95 | attention | -5.00% |" in text
    assert "out of memory" in text and "| refused: --fp8 |" in text and "a warning" not in text
    assert "2 runs that are planned: error 3.00% in the median, 5.00% at most; the phase is right in 1; " in text
    assert "1.045 times the planned peak is reserved, with an error of 18.1% in the median, 20.6% at most." in text

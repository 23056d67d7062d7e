"""The head of a page of results."""

import sys

import pytest

from benchmarks.record import Origin, installed


def test_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/mlp.py", "--sizes", "4 x 4"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    origin = Origin.now(["torch", "no-such-package"], "one GPU")
    assert origin.head("An MLP", "at night") == [
        f"# An MLP, {origin.date}",
        "",
        f"one GPU, at night; torch {installed('torch')}, no-such-package not installed. Command:",
        "",
        "    python -m benchmarks.mlp --sizes '4 x 4'",
        "",
    ]


def test_command_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/lm_head.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Origin.now([], "").command == "torchrun --standalone --nproc-per-node 2 -m benchmarks.lm_head"

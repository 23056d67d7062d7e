"""Memory over one step: the curve, and the picture of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tiling.plan.clock import H100, Clock
from megatron_tiling.plan.curve import SPANS, Moments
from megatron_tiling.plan.picture import reason_not_to_draw
from megatron_tiling.plan.room import RESERVED
from megatron_tiling.plan.tracker import Tracker
from tests.support.launch import EXAMPLES, ROOT
from tests.support.training import COMMON

KIB = 1024


def test_points_are_as_bytes_were() -> None:
    clock = Clock(H100)
    tracker = Tracker(on_operation=clock.operation)
    with tracker:
        weight = torch.ones(4 * KIB, dtype=torch.uint8)
        tracker.mark("weights", [weight])
        gone = torch.ones(32 * KIB, dtype=torch.uint8)
        tracker.reset_peak()
        moments = Moments(tracker, clock)
        del gone
        with tracker.phase("MLP"):
            one = weight + 1
            two = one + 1
            del one
        with tracker.phase("attention"):
            three = two + 1
        tracker.reset_peak()
        four = three + two
    curve = moments.curve({"always": 1})
    assert [point.parts for point in curve][-2:] == [
        {"always": 1, "weights": 4 * KIB, "kept activations: MLP": 4 * KIB, "transients: attention": 4 * KIB},
        {
            "always": 1, "weights": 4 * KIB, "kept activations: MLP": 4 * KIB, "kept activations: attention": 4 * KIB,
            "transients: other": 4 * KIB,
        },
    ]  # fmt: skip
    assert curve[0].bytes == 36 * KIB + 1
    assert [point.seconds for point in curve] == sorted(point.seconds for point in curve)
    del four


def test_what_is_fused_makes_no_point_and_many_become_few() -> None:
    clock = Clock(H100)
    tracker = Tracker(on_operation=clock.operation)
    with tracker:
        x = torch.ones(KIB, dtype=torch.uint8)
        moments = Moments(tracker, clock)
        for _ in range(2 * SPANS):
            y = x + 1
            del y
        with tracker.fused():
            big = torch.ones(1024 * KIB, dtype=torch.uint8)
            del big
        x.add_(1)
    curve = moments.curve({})
    assert SPANS / 2 < len(curve) <= 2 * SPANS + 2
    assert max(point.bytes for point in curve) == tracker.peak.bytes == 2 * KIB


#: The user's command; what is drawn is printed too.
CODE = """
import json
from megatron_tiling.plan import command
stock = command.draw
def draw(file, runs, limit, measured):
    for run in runs.values():
        print("DRAWN", json.dumps(max(run.curve, key=lambda point: point.bytes).parts), run.phase)
    stock(file, runs, limit, measured)
command.draw = draw
command.Command.others = lambda self: []
command.main()
"""


def test_the_curves_highest_point_is_what_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "step.png"
    arguments = ["plan", "--picture", str(file), str(EXAMPLES / "pretrain_gpt.py"), *COMMON, "--train-iters", "2"]
    sizes = "--hidden-size 256 --ffn-hidden-size 2048 --seq-length 512 --max-position-embeddings 512".split()
    command = [sys.executable, "-c", CODE, *arguments, *sizes, "--use-tiled-linear", "--global-batch-size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    drawn = [line.removeprefix("DRAWN ").rpartition("} ") for line in done.stdout.splitlines() if "DRAWN" in line]
    rows = [line.split() for line in done.stdout.partition("\n\n")[0].splitlines()[1:] if "DRAWN" not in line]
    printed = [
        {" ".join(row[:-2]): row[column] for row in rows if row[-1].isdigit() and row[:-2] != ["pipeline", "stage"]}
        for column in (-2, -1)
    ]
    assert len(drawn) == 2
    for (parts, bracket, _), table in zip(drawn, printed, strict=True):
        bytes_of = json.loads(parts + bracket)
        peak = sum(bytes_of.values())
        sizes_of = bytes_of | {"peak": peak, "torch reserves, about": RESERVED * peak}
        rounded = {part: f"{size / 2**20:.0f}" for part, size in sizes_of.items()}
        assert rounded == {part: mib for part, mib in table.items() if part in rounded}
        assert all(mib == "0" for part, mib in table.items() if part not in rounded)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_no_time_is_spent_where_nothing_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason_not_to_draw(str(tmp_path / "a.png")) == ""
    assert "a.doc: must end in one of ." in reason_not_to_draw(str(tmp_path / "a.doc"))
    assert "there is no folder" in reason_not_to_draw(str(tmp_path / "nowhere" / "a.svg"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason_not_to_draw("a.png") == "--picture needs matplotlib: pip install 'megatron-tiling[benchmarks]'"

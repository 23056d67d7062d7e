"""Which peaks fit: what torch's allocator reserves for them is counted, unless its segments are expandable."""

import json
import os
import subprocess
import sys

import pytest

from megatron_tiling.plan.command import GIB, Plan, main, ranking
from megatron_tiling.plan.options import OUTSIDE_GIB
from megatron_tiling.plan.room import room
from megatron_tiling.plan.run import Run
from megatron_tiling.trainer.planned import ANSWER
from tests.support.launch import EXAMPLES, ROOT
from tests.support.training import COMMON

NAMES = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
EXPANDABLE = "expandable_segments:True"
H200 = 139.8
#: Of ``--tiled-mlp-keep 3`` in a run of 126976 tokens that died of fragmentation on an H200, in its second step.
DIED = Plan("--tiled-mlp-keep 3", 0, Run(int(136.0 * GIB), {}, "MLP", 1.0, 1.0), 1.0, 1.0)


def fits(environment: dict[str, str]) -> bool:
    head, *_ = ranking([DIED], DIED, room(H200, OUTSIDE_GIB, environment).peak * GIB, "")
    return not head.startswith("none of 1 settings fits")


@pytest.mark.parametrize("name", NAMES)
def test_the_run_that_died_of_fragmentation(name: str) -> None:
    assert not fits({})
    assert fits({name: EXPANDABLE})
    assert fits({name: f"max_split_size_mb:512, {EXPANDABLE}"})
    for other in ("", "expandable_segments:False", "max_split_size_mb:512", "expandable_segments:Trueish"):
        assert not fits({name: other})


def test_where_the_two_names_differ_fragmentation_is_counted() -> None:
    assert fits(dict.fromkeys(NAMES, EXPANDABLE))
    for name in NAMES:
        assert not fits(dict.fromkeys(NAMES, EXPANDABLE) | {name: "expandable_segments:False"})


def test_what_torch_reserves_for_the_largest_peak_fits() -> None:
    plain, expandable = room(80, 3.5, {}), room(80, 3.5, {NAMES[0]: EXPANDABLE})
    assert plain.torch == expandable.torch == expandable.peak == 76.5
    assert plain.reserved * plain.peak == pytest.approx(76.5) and plain.peak == pytest.approx(73.2, abs=0.05)


def test_what_is_left_for_fragmentation_is_said() -> None:
    words = "3.3 for fragmentation (none with PYTORCH_ALLOC_CONF=expandable_segments:True)"
    assert str(room(80, 3.5, {})) == f"80 GiB less 3.5 that torch does not count, and {words}"
    expandable = room(80, 3.5, {NAMES[1]: EXPANDABLE})
    assert str(expandable) == "80 GiB less 3.5 that torch does not count (segments are expandable)"
    assert expandable.fragmentation == ""


@pytest.mark.parametrize("environment", [{}, {NAMES[1]: EXPANDABLE}], ids=["plain", "expandable"])
def test_the_command_plans_with_the_environment_it_is_given(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = []
    monkeypatch.setattr("megatron_tiling.plan.command.prepare", lambda *_: None)
    monkeypatch.setattr(
        "megatron_tiling.plan.command.Command.longest", lambda _self, _tracker, limit: limits.append(limit) or {}
    )
    monkeypatch.setattr(sys, "argv", ["megatron_tiling", "plan", "--longest", str(EXAMPLES / "pretrain_gpt.py")])
    main(environment)
    left = room(80, 3.5, environment)
    assert limits == [left.peak * GIB]
    assert capsys.readouterr().out.startswith(f"{left}; the longest sequence that fits")


@pytest.mark.parametrize("environment", [{}, {NAMES[0]: EXPANDABLE}], ids=["plain", "expandable"])
def test_a_training_run_is_answered_by_the_same_rule(environment: dict[str, str]) -> None:
    """Of its own environment, which it passes on."""
    arguments = [str(EXAMPLES / "pretrain_gpt.py"), *COMMON, "--train-iters", "2", "--global-batch-size", "2"]
    command = [sys.executable, "-m", "megatron_tiling.plan.choice", "--gpu-memory-gib", "80", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    flags = ["--use-tiled-linear", "--tiled-mlp-keep", "auto"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(next(line for line in done.stdout.splitlines() if ANSWER in line).removeprefix(ANSWER))
    left = room(80, 3.5, environment)
    assert (answer["limit_gib"], answer["torch_gib"]) == (left.peak, left.torch)
    assert answer["fragmentation"] == left.fragmentation

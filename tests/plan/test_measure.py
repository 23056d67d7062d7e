"""``--measure`` without a GPU: what is refused, what runs in child processes, and what is made of how they end."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from megatron_tiling.plan import look, measure, rates, watched
from megatron_tiling.plan.clock import H100, H200, Gpu
from megatron_tiling.plan.command import main
from megatron_tiling.plan.curve import Point
from megatron_tiling.plan.measure import Failed, Measured
from megatron_tiling.plan.picture import draw
from megatron_tiling.plan.run import Run
from tests.plan import check_rates
from tests.support.launch import ENVIRONMENT, EXAMPLES, ROOT, search_path
from tests.support.training import COMMON

GIB = 2**30
SCRIPT = str(EXAMPLES / "pretrain_gpt.py")
ENVIRON = os.environ | ENVIRONMENT | {"PYTHONPATH": search_path(), "CUDA_VISIBLE_DEVICES": ""}
SIZES = "--train-iters 2 --global-batch-size 4 --no-gradient-accumulation-fusion".split()
TWO_GPUS = 'print(\'[["Some GPU", 79.5], ["Some GPU", 79.25]]\')'


def started(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, env=ENVIRON | environment
    )


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--measure --gpu H200", "--gpu H200: --measure times the GPU that is here; leave out one of them"),
        ("--measure --longest", "--measure runs one length: leave out --longest"),
        ("--gpu H200 --longest", "--gpu H200: --longest gives no times; leave out one of them"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["megatron_tiling", "plan", *flags.split(), SCRIPT])
        main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(answer)


def test_a_machine_without_gpus() -> None:
    flags = [*COMMON, *SIZES, "--tensor-model-parallel-size", "2"]
    done = started("from megatron_tiling.__main__ import main; main()", "plan", "--measure", SCRIPT, *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "megatron_tiling plan: --measure: the command runs on 2 GPUs; torch sees none here"
    )


def test_gpus_that_are_too_small() -> None:
    done = started(CODE, "plan", "--measure", "--outside-gib", "90", SCRIPT, *COMMON, *SIZES)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "megatron_tiling plan: --outside-gib 90: must be less than 79.25, of the GPUs that are here"
    )


def test_what_writes_is_left_out() -> None:
    """Of flags that not all versions of Megatron have."""
    args = Namespace(logits_save_dir="a", dump_param_to_param_group_map="b", moe_routing_trace_path="c", seed=1)
    look.leave_out_writing(args)
    assert vars(args) == {
        "logits_save_dir": None, "dump_param_to_param_group_map": None, "moe_routing_trace_path": None, "seed": 1,
    }  # fmt: skip


def test_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_GPUS", TWO_GPUS)
    assert measure.machine(2, ENVIRON) == measure.Machine("Some GPU", 79.25)
    with pytest.raises(SystemExit, match="runs on 4 GPUs; torch sees 2 here"):
        measure.machine(4, ENVIRON)
    monkeypatch.setattr(measure, "_GPUS", "raise RuntimeError('no driver')")
    with pytest.raises(SystemExit, match="torch finds no GPU here: RuntimeError: no driver"):
        measure.machine(1, ENVIRON)


def test_rates_are_those_that_kernels_have(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "RATES", "tests.plan.check_rates")
    machine = measure.Machine("NVIDIA H200", 139.0)
    gpu = measure.rates(machine, 2, "flash", ENVIRON)
    assert (gpu.products, gpu.product_traffic) == pytest.approx((500e12, 0.3), rel=1e-6)
    assert (gpu.bandwidth, gpu.link) == (2e12, 123e9)
    assert (gpu.attention, gpu.attention_backward) == (H100.attention, H100.attention_backward)
    said = capsys.readouterr().out
    assert "times: by rates of this NVIDIA H200, timed now: products 500 TFLOP/s" in said and "123 GB/s" in said
    assert "not timed, by the table that ships with this package: attention (ImportError: no Trans" in said
    assert "attention" not in said.splitlines()[0]
    monkeypatch.setattr(measure, "RATES", "tests.plan.no_such_module")
    assert measure.rates(machine, 1, "none", ENVIRON) is H200
    assert "timing NVIDIA H200 failed (" in capsys.readouterr().out


def test_what_no_rate_fits_shows_as_an_error() -> None:
    times = {shape: 1.1 * check_rates.product_seconds(shape) for shape in rates.PRODUCTS[:-1]}
    times[rates.PRODUCTS[-1]] = check_rates.product_seconds(rates.PRODUCTS[-1])
    *_, error = rates.fitted(times, 132, check_rates.GPU.bandwidth)
    assert 0.05 < error < 0.15


def run(script: Path, gpus: int = 1) -> Any:
    return measure.records(str(script), ["--flag"], gpus, ENVIRON, history=True)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The module that is run in the place of ``watched``: it runs its script, which is a test's."""
    (tmp_path / "child.py").write_text("import runpy, sys\nrunpy.run_path(sys.argv[3])\n")
    monkeypatch.setitem(ENVIRON, "PYTHONPATH", search_path(tmp_path))
    monkeypatch.setattr(measure, "WATCHED", "child")
    return tmp_path / "script.py"


def test_how_a_child_is_started(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child.write_text(
        "import json, os, sys\n"
        "found = {'argv': sys.argv[1:], 'connections': os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS')}\n"
        "open(f\"{sys.argv[2]}.{os.environ['RANK']}.json\", 'w').write(json.dumps(found))\n"
    )
    monkeypatch.delitem(ENVIRON, "CUDA_DEVICE_MAX_CONNECTIONS")
    for gpus, connections in ((1, None), (2, "1")):
        found = run(child, gpus)
        assert len(found) == gpus
        assert [each["argv"][0] for each in found] == ["--history"] * gpus
        assert [each["argv"][2:] for each in found] == [[str(child), "--flag"]] * gpus
        assert {each["connections"] for each in found} == {connections}
    monkeypatch.setitem(ENVIRON, "CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert {each["connections"] for each in run(child, 2)} == {"8"}


def test_how_a_child_ends(child: Path) -> None:
    out_of_memory = f"{{'{watched.OUT_OF_MEMORY}': 'attention'}}"
    record = f"import json, sys; open(sys.argv[2] + '.0.json', 'w').write(json.dumps({out_of_memory}))\n"
    child.write_text(record + "raise SystemExit('CUDA out of memory.')")
    assert run(child).phase == "attention"
    child.write_text("raise SystemExit('torch.OutOfMemoryError: CUDA out of memory.')")
    assert run(child).phase == "a part of the run that is not watched"
    child.write_text("print('first')\nraise KeyError('no such thing')")
    failed = run(child)
    assert failed.phase == "" and "first" in failed.tail
    assert failed.tail.splitlines()[-1] == "KeyError: 'no such thing'"  # without torchrun's report
    child.write_text("raise SystemExit(0)")
    assert run(child) == Failed("", "it ended with 0, and without its last step")


def test_a_child_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    environment = ENVIRON | {"PYTHONPATH": search_path(tmp_path)}
    assert measure._launch("sleeper", [], 1, environment, tmp_path / "log", seconds=0.5) is None


def rank(peak: int, milliseconds: list[int]) -> dict[str, Any]:
    return {
        "peak": peak * GIB, "phase": f"phase {peak}", "reserved": (100 - peak) * GIB, "outside": peak * GIB // 10,
        "seconds": [each / 1000 for each in milliseconds], "history": [[0.0, 1], [0.5, peak * GIB]],
    }  # fmt: skip


def test_the_fullest_rank_is_what_counts() -> None:
    found = measure.measured([rank(40, [900, 100, 300, 150, 800]), rank(50, [900, 100, 200, 400, 800])])
    assert (found.rank, found.peak, found.phase) == (1, 50 * GIB, "phase 50")
    assert (found.reserved, found.outside, found.seconds) == (60 * GIB, 5 * GIB, 0.2)
    assert found.history == [(0.0, 1), (0.5, 50 * GIB)]


def test_the_table_and_what_failed() -> None:
    plan = Run(55 * GIB, {}, "MLP", 1.0, 0.19), 60 * GIB, 0.19
    found: dict[str, Measured | Failed] = {
        "dense": Failed("logits and loss", "lines"), "tiled": measure.measured([rank(50, [900, 200, 200, 200, 300])]),
        "other": Failed("", "a line\nKeyError: 'x'"),
    }  # fmt: skip
    table, _, said = measure.comparison(dict.fromkeys(found, plan), found).partition("\ndense: ")
    rows = [line.split("  ")[0] + "|" + "|".join(line.split()[-6:]) for line in table.splitlines()]
    assert rows[1].endswith("peak|out|of|memory|51200|failed")
    assert "56320 (+10.00%)" in table and "61440 (+20.0%)" in table and "190.0 (-5.0%)" in table
    assert said == (
        "out of memory in logits and loss\nother: the measured run failed. The end of what it printed:\n"
        "a line\nKeyError: 'x'"
    )


def test_a_history_is_drawn_over_its_plan(tmp_path: Path) -> None:
    points = (Point(0.0, {"weights": GIB}), Point(0.004, {"weights": 2 * GIB}))
    run = Run(2 * GIB, {"weights": 2 * GIB}, "MLP", 1.0, 0.004, points)
    found = Measured(0, 2 * GIB, "MLP", 3 * GIB, GIB, 0.2, [(0.0, GIB), (0.1, 2 * GIB), (0.2, GIB)])
    plain, drawn = tmp_path / "plain.svg", tmp_path / "drawn.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # titles are no paths
        for file, measured in ((plain, {}), (drawn, {"tiled": found})):
            draw(str(file), {"dense": run, "tiled": run}, 4 * GIB, measured)
    assert drawn.read_text().count("<path") == plain.read_text().count("<path") + 1


def test_what_is_allocated_is_what_the_allocator_counts() -> None:
    events = [
        ("alloc", 1), ("segment_alloc", 2**21), ("alloc", 1024), ("free_requested", 1), ("free_completed", 1),
    ]  # fmt: skip
    trace = [{"action": action, "size": size, "time_us": time} for time, (action, size) in enumerate(events)]
    assert list(watched.allocated(trace, 5000)) == [(0, 5512), (2, 6536), (3, 6024)]


def test_rates_of_a_kind_of_gpu() -> None:
    from megatron_tiling.plan.clock import shipped_rates

    kinds: dict[str, Gpu] = {"NVIDIA H200": H200, "NVIDIA H100 80GB HBM3": H100, "another": H100}
    assert all(shipped_rates(name) is gpu for name, gpu in kinds.items())


#: The user's command, with the trainer's own steps on a CPU. What other settings need is not looked for.
CODE = f"""
from megatron_tiling.plan import command, measure
measure._GPUS = {TWO_GPUS!r}
measure.WATCHED, measure.RATES = "tests.plan.check_watched", "tests.plan.check_rates"
command.Command.others = lambda self: []
command.main()
"""


def test_dense_does_not_fit_and_tiled_does(tmp_path: Path) -> None:
    picture, saved, board = (tmp_path / name for name in ("step.png", "saved", "board"))
    writing = ["--save", str(saved), "--save-interval", "1", "--tensorboard-dir", str(board), "--log-progress"]
    parallel = ["--tensor-model-parallel-size", "2", "--use-tiled-linear", "--exit-interval", "1"]
    flags = [*COMMON, *SIZES, *writing, *parallel, "--load", str(tmp_path / "nowhere")]
    options = ["--measure", "--picture", str(picture)]
    done = started(CODE, "plan", *options, SCRIPT, *flags, FAKE_OUT_OF_MEMORY="dense")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("times: by rates of this Some GPU, timed now: products 500 TFLOP/s")
    assert "measuring on 2 GPUs, dense ..." in lines
    table = lines[lines.index("measuring on 2 GPUs, tiled (as given) ...") + 1 :]
    peak, planned, phase = (line.split() for line in table[1:4])
    assert peak[:4] == ["peak", "out", "of", "memory"] and int(peak[4]) > 1024
    assert planned[0] == "planned" and phase == "set by attention logits and loss, backward".split()
    assert "dense: out of memory in attention" in table
    assert any(line.startswith("79.25 GiB less 3.5 that torch does not count, and 3.3 for fragm") for line in lines)
    assert picture.stat().st_size > 10_000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step.png"]


def test_a_run_that_fails_otherwise() -> None:
    flags = [*COMMON, *SIZES, "--use-tiled-linear"]
    flags.remove("--no-gradient-accumulation-fusion")  # for which dense layers need apex, and planned ones have it
    done = started(CODE, "plan", "--measure", SCRIPT, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "megatron_tiling plan: the measured run failed, see above: dense"
    assert "gradient_accumulation_fusion set to True" in done.stdout.partition("dense: the measured run failed")[2]
    peak = next(line.split() for line in done.stdout.splitlines() if line.startswith("peak") and "failed" in line)
    assert int(peak[2]) > 1024

"""Runs that ask the planner: ``auto``, and the last line of a run that is out of memory."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tiling.plan.automatic import automatic_flags
from megatron_tiling.plan.options import OUTSIDE_GIB
from megatron_tiling.plan.room import RESERVED
from megatron_tiling.trainer.phases import PLACES, phase_of
from tests.support.launch import EXAMPLES, ROOT, TRAIN_MANY, torchrun
from tests.support.training import COMMON, LLAMA, losses

CHECK = str(Path(__file__).with_name("check_planned.py"))
SCRIPT = str(EXAMPLES / "pretrain_gpt.py")
MODEL = [
    *COMMON, *LLAMA.split(), *"--hidden-size 64 --ffn-hidden-size 1024 --vocab-size 2000 --micro-batch-size 4".split(),
    *"--seq-length 256 --max-position-embeddings 256 --global-batch-size 8 --train-iters 3".split(),
]  # fmt: skip
TILED = [*MODEL, "--use-tiled-linear"]
KEEP = [*TILED, "--tiled-mlp-keep", "auto"]
MIB = 110
"""Between the peaks of keeping two tiles and three."""
NOT_PLANNED = ["--optimizer", "sgd"]


def of_mib(mib: float) -> str:
    """GiB of a GPU into which a peak of so much fits, and no larger one."""
    return f"{RESERVED * mib / 1024 + OUTSIDE_GIB:.4f}"


RUNS: dict[str, tuple[float, str, list[str]]] = {
    "out of memory": (MIB, "backward", TILED),
    "auto": (MIB, "nowhere", KEEP),
    "auto, expandable segments": (MIB, "nowhere", KEEP),
    "auto, none fits": (60, "nowhere", KEEP),
    "auto, no plan": (MIB, "nowhere", [*KEEP, *NOT_PLANNED]),
    "no plan, building": (MIB, "building", [*TILED, *NOT_PLANNED]),
    "no plan, forward": (MIB, "forward", [*TILED, *NOT_PLANNED, "--save-interval", "1"]),
    "no plan, optimizer": (MIB, "optimizer", [*TILED, *NOT_PLANNED]),
}
#: The setting of torch's allocator, for the planner alone: there is no GPU.
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
LEFT = "0.1, beside 0.0 for fragmentation (none with PYTORCH_ALLOC_CONF=expandable_segments:True)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Exit code, and the output of both ranks, of each run."""
    jobs: list[dict[str, Any]] = []
    for index, (name, (mib, place, flags)) in enumerate(RUNS.items()):
        if "--save-interval" in flags:
            flags = [*flags, "--save", str(folder / "saved"), "--ckpt-format", "torch"]
        argv = [CHECK, of_mib(mib), place, SCRIPT, *flags]
        job = {"name": name, "log": str(folder / str(index)), "argv": argv, "check": True}
        jobs.append(job | ({"env": EXPANDABLE} if "expandable" in name else {}))
    (folder / "runs.json").write_text(json.dumps(jobs))
    output = torchrun(TRAIN_MANY, folder / "runs.json", world=2)
    codes = dict(re.findall(r"^(.*): exit (\d+)", output, re.M))
    return {
        name: (int(codes[name]), [Path(folder, f"{index}.{rank}").read_text() for rank in range(2)])
        for index, name in enumerate(RUNS)
    }


def planner(*arguments: str) -> str:
    """What the user's command prints."""
    command = [sys.executable, "-m", "megatron_tiling", "plan", "--gpu-memory-gib", of_mib(MIB), "--gpus", "2"]
    done = subprocess.run([*command, SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_last_line_has_the_phase_and_what_the_planner_lists_first(runs: dict[str, tuple[int, list[str]]]) -> None:
    code, logs = runs["out of memory"]
    assert code == 1
    best = next(line for line in planner(*TILED).splitlines() if " GiB  -" in line)
    flags = re.sub(r" +\([^()]*\)$", "", best.partition(" GiB  ")[2])
    assert "--use-tiled-linear" in flags
    for rank, log in enumerate(logs):
        *_, error, line = log.splitlines()
        assert error.endswith("torch.OutOfMemoryError: CUDA out of memory. Raised by a test.")
        assert f"megatron_tiling: rank {rank} is out of memory in MLP, backward. The planner has this command" in line
        assert f" GiB of {LEFT}, set by " in line
        assert f". What fits best, at 0.1: {flags}, in the place of its tiling flags" in line
        assert len(losses(log)) <= 1
    assert sum(log.count("ASKED") for log in logs) == 1, "one planner for all ranks"


def test_auto_keeps_as_many_tiles_as_fit(runs: dict[str, tuple[int, list[str]]]) -> None:
    code, logs = runs["auto"]
    assert code == 0 and len(losses(logs[1])) == 3, logs[1][-3000:]
    assert sum(log.count("ASKED") for log in logs) == 1
    assert f"auto: chosen is --tiled-mlp-keep 2, which needs 0.1 GiB of {LEFT}, set by " in logs[0]
    assert "; the next faster, --tiled-mlp-keep 3, needs" in logs[0]
    peaks = dict(
        re.findall(r"PEAK (\d) (\d+)", subprocess.run(
            [sys.executable, "-c", PEAKS, SCRIPT, *TILED], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout)
    )  # fmt: skip
    assert int(peaks["2"]) <= MIB * 2**20 < int(peaks["3"])


def test_auto_leaves_nothing_for_fragmentation_where_segments_are_expandable(
    runs: dict[str, tuple[int, list[str]]],
) -> None:
    """The same GPU, of which torch needs no more than the peak."""
    code, logs = runs["auto, expandable segments"]
    assert code == 0, logs[1][-3000:]
    assert "auto: chosen is --tiled-mlp-keep 3, which needs 0.1 GiB of 0.1, set by " in logs[0]
    assert "; the next faster, --tiled-mlp-keep all, needs" in logs[0]


#: Of plans with numbers.
PEAKS = """
import sys
from megatron_tiling.plan.command import Command, Setting
from megatron_tiling.plan.run import prepare
command = Command(sys.argv[1], sys.argv[2:], 2)
settings = [Setting(keep, [*command.tiled.arguments, "--tiled-mlp-keep", keep]) for keep in "23"]
for one in command.plan(settings, prepare()):
    print("PEAK", one.flags, one.run.peak)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "auto, none fits",
            f"none of 5 settings fits into {LEFT.replace(',', ' GiB,')}. The smallest, --tiled-mlp-keep 0, needs 0.1",
        ),
        ("auto, no plan", "there is no plan of this command (megatron_tiling plan: --optimizer sgd: not planned yet"),
    ],
)
def test_auto_without_an_answer_ends_before_training(
    name: str, words: str, runs: dict[str, tuple[int, list[str]]]
) -> None:
    code, logs = runs[name]
    assert code == 1
    for log in logs:
        assert len([line for line in log.splitlines() if line.startswith(f"megatron_tiling: {KEEP[-2]} auto: {words}")])
        assert "Traceback" not in log and not losses(log)


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("no plan, building", "building the model and its optimizer"),
        ("no plan, forward", "MLP"),
        ("no plan, optimizer", "optimizer step"),
    ],
)
def test_where_the_planner_refuses_the_line_has_the_command(
    name: str, phase: str, runs: dict[str, tuple[int, list[str]]]
) -> None:
    code, logs = runs[name]
    assert code == 1
    for log in logs:
        line = log.splitlines()[-1]
        assert f"is out of memory in {phase}. There is no plan of this command (megatron_tiling plan: --opt" in line
        command = line.partition("To see what fits: ")[2]
        assert command.startswith("python -m megatron_tiling plan --gpu-memory-gib ") and f" -- {SCRIPT} " in command


def test_what_was_saved_is_there(runs: dict[str, tuple[int, list[str]]], folder: Path) -> None:
    assert len(losses(runs["no plan, forward"][1][1])) == 1
    assert (folder / "saved" / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_what_auto_may_be() -> None:
    assert automatic_flags(["--tile-factor", "8"]) == []
    both = automatic_flags("--tile-factor auto --tiled-mlp-keep auto".split())
    assert both[0] == "--tile-factor 1 --tiled-mlp-keep all" and both[-1] == "--tile-factor 16 --tiled-mlp-keep 0"
    assert [flags for flags in both if "--tile-factor 1 " in flags] == [both[0], "--tile-factor 1 --tiled-mlp-keep 0"]
    factors = automatic_flags(["--tile-factor=auto", "--tiled-mlp-keep", "1"])
    assert factors == [f"--tile-factor {tiles}" for tiles in (1, 2, 4, 8, 16)]
    grids = automatic_flags("--tiled-mlp-keep auto --tiled-linear-splits fc1=1x8 fc2=8x1 experts=2".split())
    assert grids == ["--tiled-mlp-keep all", "--tiled-mlp-keep 1", "--tiled-mlp-keep 0"]
    in_steps = automatic_flags("--tiled-mlp-keep auto --tiled-tp-overlap auto".split())
    assert in_steps == ["--tiled-mlp-keep all", "--tiled-mlp-keep 0"]


def test_phases_without_a_module() -> None:
    def error_in(function: Any) -> BaseException:
        try:
            function()
        except ValueError as error:
            return error
        raise AssertionError

    def nowhere() -> None:
        raise ValueError

    assert phase_of(error_in(nowhere)) == "a part of the step that has no name"

    def backward() -> None:
        import torch

        weight = torch.ones(1, requires_grad=True)
        weight.register_hook(lambda grad: nowhere())
        (weight * 2).sum().backward()

    assert phase_of(error_in(backward)) == "the backward pass"


@pytest.mark.parametrize("kind", ["mlp", "expert", "head", "scores", "softmax"])
def test_files_of_the_loops_have_a_phase(kind: str) -> None:
    """In a backward pass the files of its frames are all that tells what ran."""
    files = [file for file in (ROOT / "megatron_tiling" / "tiles").glob("*.py") if kind in file.name]
    assert files
    for file in files:
        assert any(part in str(file) for part in PLACES), file

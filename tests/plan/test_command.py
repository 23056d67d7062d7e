"""The command: which ranks it looks at, what it compares and prints, and what it says of commands that do not run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tiling.plan.clock import CLOCK, GPUS
from megatron_tiling.plan.command import GIB, RECOMPUTE_LAYERS, Command, Plan, main, ranking, table
from megatron_tiling.plan.options import parse
from megatron_tiling.plan.processes import in_processes
from megatron_tiling.plan.run import Run
from megatron_tiling.plan.tracker import Tracker
from tests.support.launch import EXAMPLES, ROOT
from tests.support.training import COMMON

PARTS = ("weig", "opti")
SIZES = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4".split()


def plan(flags: str, peak: float, work: float) -> Plan:
    return Plan(flags, 0, Run(int(peak * GIB), {"weights": int(peak * GIB)}, "MLP", work, work), work, work)


def test_ranks_of_pipeline_stages() -> None:
    assert Command("x.py", SIZES, 64).ranks == {0: 0, 3: 48}
    assert Command("x.py", [*SIZES, "--use-tp-pp-dp-mapping"], 64).ranks == {0: 0, 3: 6}
    assert Command("x.py", [*SIZES, "--pipeline-model-parallel-layout", "E|t|t|L"], None).ranks == {
        0: 0, 1: 2, 2: 4, 3: 6,
    }  # fmt: skip
    assert Command("x.py", [], None).ranks == {0: 0}
    experts = "--num-experts 8 --expert-model-parallel-size 4".split()
    assert Command("x.py", [*SIZES, *experts], None).gpus == 32
    assert Command("x.py", [*SIZES, *experts, "--expert-tensor-parallel-size", "1"], None).gpus == 16
    for gpus in (12, 0, -8):
        with pytest.raises(SystemExit, match=f"--gpus {gpus}: must be a positive multiple of 8"):
            Command("x.py", SIZES, gpus)


def test_settings_that_are_compared() -> None:
    given = ["--use-tiled-linear", "--tile-factor", "4", "--num-layers", "4"]
    command = Command("x.py", given, None)
    assert command.dense.arguments == ["--num-layers", "4"]
    assert command.tiled.arguments == given
    others = [setting.flags for setting in command.others()]
    assert "--use-tiled-linear" in others and len(set(others)) == len(others)
    assert any("--recompute-granularity" in flags for flags in others)
    for recompute in ("--recompute-granularity full", "--recompute-granularity=full", "--recompute-activations"):
        settings = Command("x.py", recompute.split(), None).others()
        assert not any("--recompute" in setting.flags for setting in settings)


@pytest.mark.parametrize("flags", ["", "--attention-backend unfused", "--transformer-impl local"])
def test_scores_are_recomputed_where_they_are_kept(flags: str) -> None:
    settings = Command("x.py", flags.split(), None).others()
    assert any("core_attn" in setting.flags for setting in settings) == bool(flags)


def test_forms_of_arguments() -> None:
    layout = Command("x.py", ["--pipeline-model-parallel-size=3", "--pipeline-model-parallel-layout=E|t|L"], None)
    assert layout.ranks == {0: 0, 1: 1, 2: 2}
    experts = Command("x.py", ["--pipeline-model-parallel-size", "3", "--moe-layer-freq", "([0]*1+[1]*2)"], None)
    assert experts.ranks == {0: 0, 1: 1, 2: 2}
    alias = Command("x.py", ["--memory-centric-tiled-linear", "--tile-factor=8"], None)
    assert alias.dense.arguments == []
    assert alias.tiled.arguments == ["--memory-centric-tiled-linear", "--tile-factor=8"]
    without = Command("x.py", ["--tile-factor", "8"], None)
    assert without.tiled.arguments == ["--tile-factor", "8", "--use-tiled-linear"]
    assert "--use-tiled-linear" in [setting.flags for setting in without.others()]


def test_ranking() -> None:
    dense = plan("", 50, 1.0)
    plans = [dense, plan("--keep 0", 30, 1.2), plan("--tiled", 40, 1.0), plan("--worse", 45, 1.1)]
    assert [line.split()[4] for line in ranking(plans, dense, 80 * GIB, "")[1:]] == ["--tiled", "--keep"]
    assert [line.split()[4] for line in ranking(plans, dense, 35 * GIB, "")[1:]] == ["--keep"]
    head, smallest = ranking(plans, dense, 20 * GIB, "other words")
    assert head == "none of 4 settings fits; try other words. The smallest:" and "--keep 0" in smallest


def test_advice_names_what_the_command_can_take() -> None:
    sharded = "--use-distributed-optimizer"
    assert Command("x.py", [], None).advice == (
        f"more tensor, pipeline or context parallelism, {sharded}, or a smaller micro-batch"
    )
    assert Command("x.py", ["--num-experts", "8", sharded], None).advice == (
        "more tensor, pipeline, context or expert parallelism, or a smaller micro-batch"
    )


def test_table() -> None:
    lines = table([plan("", 50, 1.0), plan("--tiled", 40, 1.0)], ["dense", "tiled"], 1.5).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["MiB", "at", "the", "peak", "dense", "tiled"], ["weights", "51200", "40960"], ["peak", "51200", "40960"],
        ["torch", "reserves,", "about", "76800", "61440"],
    ]  # fmt: skip


def test_processes(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("no such flag")

    one, failed, two, killed = in_processes([lambda: 1, fail, lambda: 2, lambda: os.kill(os.getpid(), 9)])
    assert killed == "a plan's process ended with exit code -9"
    assert (one, two) == (1, 2) and "no such flag" in str(failed)
    assert capfd.readouterr() == ("", "")


def planned(flags: list[str], world: int, code: str) -> str:
    """What ``code`` prints, where ``run`` is a plan of the first stage."""
    script = str(EXAMPLES / "pretrain_gpt.py")
    before = (
        "import functools\n"
        "from megatron_tiling.plan.processes import in_processes\n"
        "from megatron_tiling.plan.run import plan, prepare\n"
        f"run = functools.partial(plan, prepare(False), {script!r}, {flags!r}, {world}, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_stage_without_tiles() -> None:
    flags = [*COMMON, "--pipeline-model-parallel-size", "2", "--global-batch-size", "4", "--train-iters", "2"]
    flags += ["--use-tiled-linear", "--tiled-linear-modules", "output"]
    assert int(planned(flags, 2, "print('bytes', run().peak)").split()[-1]) > 0


@pytest.mark.parametrize(("steps", "mib"), [("2", 4), ("auto", 0)])
def test_symmetric_memory_is_counted_where_layers_overlap(steps: str, mib: int) -> None:
    """That of all layers is one: of two sources, and of what arrives from two ranks. ``auto`` leaves small layers."""
    tokens, hidden = 2048, 512
    flags = [*COMMON, "--hidden-size", str(hidden), "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    flags += ["--seq-length", str(tokens), "--max-position-embeddings", str(tokens), "--micro-batch-size", "1"]
    flags += [
        "--bf16",
        "--train-iters",
        "2",
        "--global-batch-size",
        "2",
        "--use-tiled-linear",
        "--tiled-tp-overlap",
        steps,
    ]
    code = "print('BYTES', run().parts.get('symmetric memory', 0))"
    found = int(planned(flags, 2, code).rpartition("BYTES ")[2].split()[0])
    assert found == mib * 2**20


def test_backward_passes_that_are_let_go_change_nothing() -> None:
    flags = [*COMMON, "--num-layers", "4", "--pipeline-model-parallel-size", "4"]
    flags += ["--global-batch-size", "10", "--train-iters", "2"]
    code = """
some, all_ = in_processes([run, functools.partial(run, draw=True)])
print("EQUAL", some.peak == all_.peak, some.parts == all_.parts, some.phase == all_.phase, len(all_.curve) > 1)
print("FLOPS", some.flops / all_.flops, some.seconds / all_.seconds)
"""
    lines = dict(line.split(maxsplit=1) for line in planned(flags, 4, code).splitlines() if line[:5] in "EQUAL FLOPS")
    assert lines["EQUAL"] == "True True True True"
    assert [float(ratio) for ratio in lines["FLOPS"].split()] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--hidden-size 64", "assert args.micro-batch-size is not None"),
        (
            "--optimizer sgd --moe-use-upcycling --sft --rampup-batch-size 1 1 10",
            "--sft, --moe-use-upcycling, --rampup-batch-size, --optimizer sgd: not planned yet",
        ),
        (
            "--num-experts 4 --moe-token-dispatcher-type flex --moe-expert-capacity-factor 1",
            "--moe-token-dispatcher-type flex, --moe-expert-capacity-factor without "
            "--moe-pad-expert-input-to-capacity: not planned yet",
        ),
        (
            "--fp8-format hybrid --fp8-recipe mxfp8 --num-experts 4",
            "--fp8-recipe mxfp8, --num-experts with --fp8-format: not planned yet",
        ),
        (
            "--tokenizer-type Llama2Tokenizer --tokenizer-model /not/on/this/machine",
            "--tokenizer-type Llama2Tokenizer: it cannot be built here (ValueError: tokenizer-path: "
            "/not/on/this/machine is invalid); give --tokenizer-type NullTokenizer --vocab-size N in its place",
        ),
        ("--no-rope-fusion", "no figures of apex's masked softmax yet; add --no-masked-softmax-fusion"),
        ("--expert-imbalance 1", "--expert-imbalance 1: the model has no experts; leave it out, or give --num-experts"),
        (
            "--expert-imbalance 1.5 --num-experts 4 --moe-token-dispatcher-type alltoall "
            "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity",
            "--expert-imbalance 1.5: --moe-pad-expert-input-to-capacity gives all experts as many rows; leave one of",
        ),
    ],
)
def test_a_command_that_does_not_run(flags: str, answer: str) -> None:
    model = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --train-iters 1 "
        "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --bf16 "
    )
    flags = flags if "assert" in answer else model + flags
    own, words = [], flags.split()
    if "--expert-imbalance" in words:
        place = words.index("--expert-imbalance")
        own = [words.pop(place), words.pop(place)]
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_tiling", "plan", *own, str(EXAMPLES / "pretrain_gpt.py"), *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode != 0
    assert answer in ended.stderr.replace("_", "-"), ended.stderr[-3000:]
    assert ('\n  File "' in ended.stderr) == ("assert" in answer), "lines of a trace are stock's alone"


def test_a_script_that_does_not_train(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(0)")
    command = [sys.executable, "-m", "megatron_tiling", "plan", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert "script.py ended before Megatron's trainer took a step" in ended.stderr


#: The example's, on frozen layers with low-rank paths.
LORA = """
import pretrain_gpt
from lora import add_lora

stock = pretrain_gpt.gpt_config_from_args


def add(chunks):
    for chunk in chunks:
        chunk.requires_grad_(False)
        add_lora(chunk, ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], rank=4, alpha=8)
    return chunks


def config(args):
    found = stock(args)
    found.pre_wrap_hooks.append(add)
    return found


pretrain_gpt.gpt_config_from_args = config
parsed = pretrain_gpt.parse_args(pretrain_gpt.REFUSED)
pretrain_gpt.train(parsed, pretrain_gpt.dataset_kind(parsed))
"""


def test_lora_and_what_would_not_train_it(tmp_path: Path) -> None:
    """Moments are those of the adapters. Megatron's full recompute of blocks of frozen inputs makes no gradients."""
    script = tmp_path / "script.py"
    script.write_text(LORA)
    flags = [*COMMON, "--no-gradient-accumulation-fusion", "--train-iters", "2", "--global-batch-size", "2"]
    flags += ["--hidden-size", "512", "--use-tiled-linear", "--tiled-linear-modules", "output"]

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "megatron_tiling", "plan", str(script), *flags, *more]
        path = {"PYTHONPATH": f"{ROOT}:{EXAMPLES}"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = run()
    parts = {line.rsplit(maxsplit=2)[0]: int(line.split()[-1]) for line in found.splitlines() if line[:4] in PARTS}
    assert parts["optimizer states"] < parts["weights"] > 0
    lost = [line for line in found.splitlines() if line.startswith("  not among them: --recompute-granularity full")]
    assert len(lost) == 5 and all(re.search(r": no gradient reaches \d+ parameters that train", line) for line in lost)
    assert "trainable parameters: are they in" not in found
    found = run("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    assert "trainable parameters: are they in recomputed blocks of frozen inputs?" in found


def test_gradients_are_lost_against_the_commands_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Any) -> Run:
        return Run(1, {}, "MLP", 1.0, 1.0, untrained=5 if "--recompute-granularity" in job.args[2] else 2)

    monkeypatch.setattr("megatron_tiling.plan.command.in_processes", lambda jobs: [run(job) for job in jobs])
    command = Command("x.py", ["--num-layers", "4"], None)
    recomputed = command.with_flags(RECOMPUTE_LAYERS)
    tracker = Tracker()
    assert list(command.plan([recomputed], tracker)) == ["no gradient reaches 5 parameters that train otherwise"]
    own, lost = command.plan([command.tiled, recomputed], tracker)
    assert isinstance(own, Plan) and lost == "no gradient reaches 3 parameters that train otherwise"
    recomputes = Command("x.py", ["--seq-length", "1024", *RECOMPUTE_LAYERS.split()], None)
    assert all(tokens == 0 for tokens in recomputes.longest(tracker, limit=0.5).values())


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "80GB"])
@pytest.mark.parametrize("flag", ["--gpu-memory-gib", "--outside-gib"])
def test_memory_is_a_number(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([flag, value, str(EXAMPLES / "pretrain_gpt.py")])
    assert f"argument {flag}: {value}: must be a number of GiB, such as 80" in capsys.readouterr().err


def test_memory_that_is_not_there() -> None:
    options = ["plan", "--gpu-memory-gib", "3", str(EXAMPLES / "pretrain_gpt.py")]
    done = subprocess.run([sys.executable, "-m", "megatron_tiling", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--gpu-memory-gib 3: must be more than --outside-gib 3.5")


@pytest.mark.parametrize("flag", ["--gpus=8", "--longest"])
def test_flags_of_the_planner_stand_before_the_script(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(EXAMPLES / "pretrain_gpt.py")
    with pytest.raises(SystemExit):
        parse([script, "--num-layers", "2", flag])
    name = flag.partition("=")[0]
    assert f"error: {name} is the planner's: it stands before the script" in capsys.readouterr().err
    assert parse(["--gpus=8", script, "--num-layers", "2"]).gpus == 8


def test_flags_of_the_script_stand_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--use-tiled-linear", str(EXAMPLES / "pretrain_gpt.py"), "--num-layers", "2"])
    assert "unrecognized arguments: --use-tiled-linear; those of the script stand behind it" in capsys.readouterr().err


def test_flags_of_the_script_that_the_planner_has_too() -> None:
    options = parse(["--gpus", "8", "--", str(EXAMPLES / "pretrain_gpt.py"), "--gpus", "4", "--measure"])
    assert (options.gpus, options.measure, options.arguments) == (8, False, ["--gpus", "4", "--measure"])


@pytest.mark.parametrize("behind", ["--", "-- --of-the-script 1", "--num-layers 2 -- 1", "--num-layers 2 --"])
@pytest.mark.parametrize("ahead", ["", "--gpus 2 --"])
def test_dashes_of_the_script_are_refused(ahead: str, behind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags of a setting go behind its arguments: they would be none of the script's."""
    with pytest.raises(SystemExit):
        parse([*ahead.split(), str(EXAMPLES / "pretrain_gpt.py"), *behind.split()])
    assert "error: -- among the arguments of the script: " in capsys.readouterr().err


def test_a_tree_is_planned_with_its_own_megatron(tmp_path: Path) -> None:
    """From any folder, beside an installed megatron-core."""
    (tmp_path / "pretrain_gpt.py").touch()
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text('raise SystemExit("the tree\'s own")\n')
    command = [sys.executable, "-m", "megatron_tiling", "plan", str(tmp_path / "pretrain_gpt.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "the tree's own"


def test_a_gpus_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object) -> None:
        raise SystemExit("before the first plan")

    monkeypatch.setattr(CLOCK, "gpu", GPUS["H100"])
    monkeypatch.setattr("megatron_tiling.plan.command.prepare", prepare)
    monkeypatch.setattr(sys, "argv", ["megatron_tiling", "plan", "--gpu", "H200", str(EXAMPLES / "pretrain_gpt.py")])
    with pytest.raises(SystemExit, match="before the first plan"):
        main()
    assert CLOCK.gpu is GPUS["H200"]

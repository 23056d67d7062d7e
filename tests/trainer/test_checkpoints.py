"""Tiling never shows in a checkpoint: what one run saves, a run of any other tiling and layout continues.

Runs go through the stock trainer. A run that saves goes on to the end, so that it is also the reference of those that
resume from its middle. Its layout has no data parallelism unless it says so, so that all runs see the same batches.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT, TRAIN_MANY, torchrun
from tests.support.training import COMMON, SCRIPTS

SAVED_AT, ITERATIONS = 3, 7
MODELS = {
    "llama": "--swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights",
    "tied": "",
    "experts": "--swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --moe-ffn-hidden-size 80 "
    "--moe-shared-expert-intermediate-size 48",
}
TILINGS = {
    "dense": "--no-gradient-accumulation-fusion",
    "factor 3": "--use-tiled-linear --tile-factor 3 --tiled-linear-modules all",
    "factor 8, keep none": "--use-tiled-linear --tile-factor 8 --tiled-mlp-keep 0",
    "no head, stock MLP": "--use-tiled-linear --tile-factor 3 --tiled-linear-modules qkv proj fc1 fc2 "
    "--tiled-linear-splits fc1=2x3",
    "FSDP2, factor 3": "--use-tiled-linear --tile-factor 3 --use-torch-fsdp2 --no-gradient-accumulation-fusion",
}
LAYOUTS = {
    "TP=1": (1, ""),
    "TP=2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "TP=4": (4, "--tensor-model-parallel-size 4"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
    "DP=2": (2, ""),
    "TP=2, DP=2": (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
}
# The same initial weights and the same padded vocabulary at every TP size; no random numbers while training.
SETTINGS = (
    "--use-cpu-initialization --make-vocab-size-divisible-by 32 --hidden-dropout 0 --global-batch-size 4 "
    f"--train-iters {ITERATIONS}"
)
STORAGES = {
    "torch_dist": "--ckpt-format torch_dist",
    "serial": "--ckpt-format torch_dist --no-ckpt-fully-parallel-save",
    "asynchronous": "--ckpt-format torch_dist --async-save --use-persistent-ckpt-worker --async-strategy mcore",
    "legacy": "--ckpt-format torch",
}


@dataclass(frozen=True)
class Run:
    """A training run; with a ``source``, one that resumes from the middle of that run, else one that saves."""

    layout: str
    tiling: str
    source: "Run | None" = None
    model: str = "llama"
    storage: str = "torch_dist"

    @property
    def world(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def name(self) -> str:
        usual = {"llama", "torch_dist"}
        own = [self.layout, self.tiling, *(word for word in (self.model, self.storage) if word not in usual)]
        whole = [*([] if self.source is None else [self.source.name, "to"]), *own]
        return re.sub(r"[ ,]+", "-", " ".join(whole))


def reference(run: Run) -> Run:
    """The dense run that a resumed one continues; Megatron draws other initial weights for each pipeline size."""
    assert run.source is not None
    return Run("PP=2" if run.source.layout == "PP=2" else "TP=1", "dense", model=run.model)


def resumed(source: Run, layout: str, tiling: str) -> Run:
    return Run(layout, tiling, source, source.model, "legacy" if source.storage == "legacy" else "torch_dist")


DENSE = Run("TP=1", "dense")
THREE = Run("TP=1", "factor 3")
EIGHT = Run("TP=1", "factor 8, keep none")
NO_HEAD = Run("TP=1", "no head, stock MLP")
TWO_RANKS = Run("TP=2", "factor 3")
FOUR_RANKS = Run("TP=4", "factor 8, keep none")
PIPELINE = Run("PP=2", "factor 8, keep none", model="tied")
DENSE_TIED = Run("TP=1", "dense", model="tied")
DENSE_EXPERTS = Run("TP=1", "dense", model="experts")
LEGACY_DENSE = Run("TP=2", "dense", storage="legacy")
LEGACY_TILED = Run("TP=2", "factor 3", storage="legacy")
PARALLEL_SAVE = Run("DP=2", "factor 3")
SERIAL_SAVE = Run("DP=2", "factor 8, keep none", storage="serial")
ASYNC_SAVE = Run("TP=2", "factor 8, keep none", storage="asynchronous")
SHARDED = Run("DP=2", "FSDP2, factor 3")
SHARDED_TWICE = Run("TP=2, DP=2", "FSDP2, factor 3")
RESUMED = [
    resumed(DENSE, "TP=1", "factor 3"),
    resumed(THREE, "TP=1", "dense"),
    resumed(THREE, "TP=1", "factor 3"),
    resumed(THREE, "TP=1", "factor 8, keep none"),
    resumed(EIGHT, "TP=1", "factor 3"),
    resumed(EIGHT, "TP=1", "no head, stock MLP"),
    resumed(NO_HEAD, "TP=1", "factor 8, keep none"),
    resumed(DENSE, "TP=2", "factor 3"),
    resumed(THREE, "TP=2", "factor 8, keep none"),
    resumed(TWO_RANKS, "TP=2", "factor 3"),
    resumed(TWO_RANKS, "TP=1", "dense"),
    resumed(TWO_RANKS, "TP=4", "factor 8, keep none"),
    resumed(FOUR_RANKS, "TP=4", "factor 8, keep none"),
    resumed(FOUR_RANKS, "TP=2", "factor 3"),
    resumed(FOUR_RANKS, "TP=1", "dense"),
    resumed(DENSE_TIED, "PP=2", "factor 3"),
    resumed(DENSE_TIED, "TP=2", "factor 3"),
    resumed(PIPELINE, "PP=2", "factor 8, keep none"),
    resumed(PIPELINE, "TP=1", "dense"),
    resumed(DENSE_EXPERTS, "TP=1", "factor 3"),
    resumed(DENSE_EXPERTS, "TP=2", "factor 8, keep none"),
    resumed(LEGACY_DENSE, "TP=2", "factor 3"),
    resumed(LEGACY_TILED, "TP=2", "dense"),
    resumed(LEGACY_TILED, "TP=2", "factor 3"),
    resumed(PARALLEL_SAVE, "DP=2", "factor 3"),
    resumed(PARALLEL_SAVE, "TP=1", "dense"),
    resumed(SERIAL_SAVE, "TP=2", "factor 3"),
    resumed(ASYNC_SAVE, "TP=2", "factor 8, keep none"),
    resumed(ASYNC_SAVE, "TP=1", "dense"),
    resumed(SHARDED, "TP=1", "dense"),
    resumed(SHARDED, "TP=2", "factor 3"),
    resumed(SHARDED, "DP=2", "FSDP2, factor 3"),
    resumed(DENSE, "DP=2", "FSDP2, factor 3"),
    resumed(SHARDED_TWICE, "TP=1", "dense"),
    resumed(SHARDED_TWICE, "TP=2, DP=2", "FSDP2, factor 3"),
    resumed(DENSE, "TP=2, DP=2", "FSDP2, factor 3"),
]


def stages(runs: list[Run]) -> list[list[Run]]:
    """Runs in an order in which each finds its source saved; those of a stage have one world size."""
    sources = [run.source for run in runs if run.source]
    missing = list(dict.fromkeys([*sources, *map(reference, runs), *runs]))
    ordered: list[list[Run]] = []
    saved: set[Run | None] = {None}
    for world in (1, 2, 4, 2, 1):
        saved |= {run for run in missing if run.world == world and run.source is None}
        ready = [run for run in missing if run.world == world and run.source in saved]
        ordered.append(sorted(ready, key=lambda run: run.source is not None))
        missing = [run for run in missing if run not in ready]
    assert not missing
    return [stage for stage in ordered if stage]


def arguments(run: Run, folder: Path) -> list[str]:
    flags = [*COMMON, *MODELS[run.model].split(), *LAYOUTS[run.layout][1].split(), *TILINGS[run.tiling].split()]
    flags += [*SETTINGS.split(), *STORAGES[run.storage].split()]
    if run.source is None:
        flags += ["--save", str(folder / run.name), "--save-interval", str(SAVED_AT)]
    else:
        flags += ["--load", str(folder / run.source.name), "--ckpt-step", str(SAVED_AT)]
    return [str(SCRIPTS / "pretrain_gpt.py"), *flags]


def entry(name: str, argv: list[str], log: Path) -> dict[str, object]:
    # FSDP2 and sequence parallelism ask for different ones.
    connections = "8" if "--use-torch-fsdp2" in argv else "1"
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": connections}
    return {"name": name, "log": str(log), "argv": argv, "env": env}


def run_together(entries: list[dict[str, object]], file: Path, world: int) -> str:
    file.write_text(json.dumps(entries))
    return torchrun(TRAIN_MANY, file, world=world)


def losses(log: Path, world: int) -> dict[int, str]:
    """The logged loss of each iteration, as it is printed."""
    text = "".join(Path(f"{log}.{rank}").read_text() for rank in range(world))
    found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", text)
    return {int(iteration): loss for iteration, loss in found}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the matrix that the selected tests look at: logs are NAME.log.RANK."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tests = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    selected = [test.callspec.params["run"] for test in tests if "folder" in test.fixturenames]
    for number, stage in enumerate(stages(selected)):
        entries = [entry(run.name, arguments(run, folder), folder / f"{run.name}.log") for run in stage]
        run_together(entries, folder / f"{number}.json", stage[0].world)
    return folder


@pytest.mark.feature("checkpoints, dense to tiled and back, between TP, PP, DP and FSDP2; torch_dist and legacy")
@pytest.mark.parametrize("run", RESUMED, ids=lambda run: run.name)
def test_resume_equals_uninterrupted_dense(run: Run, folder: Path) -> None:
    assert run.source is not None
    found = losses(folder / f"{run.name}.log", run.world)
    source = losses(folder / f"{run.source.name}.log", run.source.world)
    dense = losses(folder / f"{reference(run).name}.log", reference(run).world)
    assert list(dense) == list(source) == list(range(1, ITERATIONS + 1))
    log = (folder / f"{run.name}.log.0").read_text()
    assert list(found) == list(range(SAVED_AT + 1, ITERATIONS + 1)), log[-3000:]
    assert ("megatron_tiling: tiled linear layers" in log) == (run.tiling != "dense")
    # The trainer logs the mean of two iterations as the second loss of a run.
    compared = [iteration for iteration in found if iteration != SAVED_AT + 2]
    difference = max(abs(float(found[iteration]) - float(dense[iteration])) for iteration in compared)
    assert difference <= 2e-5, f"largest difference {difference:.1e}"
    if (run.layout, run.tiling) == (run.source.layout, run.source.tiling):
        assert [found[iteration] for iteration in compared] == [source[iteration] for iteration in compared]


def test_entries_and_optimizer_state(tmp_path: Path) -> None:
    output = torchrun(ROOT / "tests" / "trainer" / "check_checkpoints.py", tmp_path, world=2)
    assert all(f"checkpoint checks passed at TP={tp}" in output for tp in (1, 2))


def test_script_can_be_imported_by_the_processes_that_write_a_checkpoint() -> None:
    script = SCRIPTS / "pretrain_gpt.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__mp_main__')"
    subprocess.run([sys.executable, "-c", code], check=True)

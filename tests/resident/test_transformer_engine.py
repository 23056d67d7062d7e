"""--transformer-impl transformer_engine, on stand-ins for TransformerEngine's layers, for arithmetic on a CPU.

Megatron's own TransformerEngine classes and specs run, on the stand-ins of stand_ins/. One start of torchrun: the
checks of check_transformer_engine.py, and training runs that load one another's checkpoints.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.support.launch import ROOT, TRAIN_MANY, search_path, torchrun
from tests.support.training import COMMON, LLAMA, SCRIPTS, losses

ITERATIONS, SAVED_AT, WORLD = 6, 3, 2
FLAGS = (
    f"--transformer-impl transformer_engine --tensor-model-parallel-size 2 --sequence-parallel {LLAMA} "
    f"--hidden-dropout 0 --global-batch-size 4 --train-iters {ITERATIONS} --save-interval {SAVED_AT}"
)
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-grouped-gemm --moe-ffn-hidden-size 80 --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --moe-token-dispatcher-type allgather --use-distributed-optimizer "
    "--overlap-grad-reduce"
)
FP8 = "--fp8-format hybrid --fp8-recipe blockwise"
#: Flags of a run; it saves into a folder of its name, and resumes from the middle of the run named last, if any.
RUNS = {
    "dense": ("--no-gradient-accumulation-fusion", None),
    "tiled": ("--use-tiled-linear --tile-factor 3 --tiled-linear-modules all", None),
    "tiled from dense": ("--use-tiled-linear", "dense"),
    "dense from tiled": ("--no-gradient-accumulation-fusion", "tiled"),
    "by spec": ("--no-gradient-accumulation-fusion --spec megatron_tiling.spec tiled_layer_spec", None),
    "dense experts": (f"--no-gradient-accumulation-fusion {EXPERTS}", None),
    "tiled experts": (f"--use-tiled-linear --tiled-linear-splits experts=3 --tiled-mlp-keep 1 {EXPERTS}", None),
    "fp8": (f"--use-tiled-linear {FP8}", None),
    "nothing": (f"--use-tiled-linear {FP8} --tiled-linear-modules fc1 fc2", None),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine itself is installed"
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("transformer_engine")
    commands = {"checks": [str(ROOT / "tests" / "resident" / "check_transformer_engine.py")]}
    for name, (extra, source) in RUNS.items():
        commands[name] = [str(SCRIPTS / "pretrain_gpt.py"), *COMMON, *FLAGS.split(), *extra.split()]
        commands[name] += ["--save", str(folder / f"saved {name}")]
        if source is not None:
            commands[name] += ["--load", str(folder / f"saved {source}"), "--ckpt-step", str(SAVED_AT)]
    runs = [
        {"name": name, "log": str(folder / name), "argv": argv, "check": name == "checks"}
        for name, argv in commands.items()
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    path = search_path(ROOT / "tests" / "stand_ins")
    torchrun(TRAIN_MANY, folder / "runs.json", world=WORLD, environment={"PYTHONPATH": path})
    return {name: "".join(Path(folder, f"{name}.{rank}").read_text() for rank in range(WORLD)) for name in commands}


@pytest.mark.feature("models of TransformerEngine's specs, on stand-ins for its layers")
@pytest.mark.parametrize("size", [1, 2])
def test_models_equal_dense(size: int, logs: dict[str, str]) -> None:
    assert f"TransformerEngine checks passed at TP={size}" in logs["checks"], logs["checks"][-6000:]


@pytest.mark.feature("training: `--transformer-impl transformer_engine`, on stand-ins for its layers")
@pytest.mark.parametrize("name", ["tiled", "tiled from dense", "dense from tiled", "by spec"])
def test_training_equals_dense(name: str, logs: dict[str, str]) -> None:
    """From the start, and from what the other kind has saved."""
    expected, found = losses(logs["dense"]), losses(logs[name])
    first = SAVED_AT if RUNS[name][1] else 0
    assert len(expected) == ITERATIONS, logs["dense"][-3000:]
    assert len(found) == ITERATIONS - first, logs[name][-3000:]
    differences = [abs(a - b) for a, b in zip(expected[first:], found, strict=True)]
    del differences[1]  # what is logged second after a start is a mean of two iterations
    assert max(differences) <= 2e-5
    assert bool(re.search("GEMMs: 0$", logs[name], re.M)) == name.startswith("dense")


@pytest.mark.feature("training: grouped experts, EP=2, on stand-ins for TransformerEngine's layers")
def test_training_with_grouped_experts_equals_dense(logs: dict[str, str]) -> None:
    expected, found = losses(logs["dense experts"]), losses(logs["tiled experts"])
    assert len(expected) == len(found) == ITERATIONS, logs["tiled experts"][-3000:]
    assert found == pytest.approx(expected, abs=2e-5, rel=0)
    row = r"mlp\.experts +2 +2 x 48 x 160 +- +- +TiledExperts, at most 3 tiles of about as many rows, keep 1\n"
    assert re.search(row, logs["tiled experts"])


def test_the_startup_table(logs: dict[str, str]) -> None:
    for module, grid in {"self_attention.linear_qkv": "1x3", "mlp.linear_fc1": "1x3", "mlp.linear_fc2": "3x1"}.items():
        assert re.search(rf"{re.escape(module)} +2 +\d+ x \d+ +{grid} ", logs["tiled"]), module
    assert logs["tiled"].count("TiledMLP, keep all") == 2


def test_the_head_of_an_fp8_run_is_tiled(logs: dict[str, str]) -> None:
    """The stand-ins do not quantize; test_training_gpu does."""
    found = losses(logs["fp8"])
    assert len(found) == ITERATIONS, logs["fp8"][-3000:]
    assert found == pytest.approx(losses(logs["dense"]), abs=2e-5, rel=0)
    dense = r"mlp\.linear_fc\d +2 .* dense .* --fp8-format hybrid: tiles need a newer TransformerEngine or "
    assert len(re.findall(dense, logs["fp8"], re.M)) == 2
    assert re.search(r"^output_layer .* loss in tiles of ", logs["fp8"], re.M)


def test_nothing_but_layers_that_stay_dense_ends_the_run(logs: dict[str, str]) -> None:
    words = "--use-tiled-linear: no layer of this model can be tiled (--fp8-format hybrid: tiles need a newer "
    assert words in logs["nothing"] and "; not in --tiled-linear-modules)" in logs["nothing"]
    assert "Traceback" not in logs["nothing"] and not losses(logs["nothing"])

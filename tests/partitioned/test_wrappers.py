"""Megatron-FSDP and torch FSDP2 through the stock trainer, tiles as their units: dense losses, two tiles gathered."""

import json
import re
from pathlib import Path

import pytest

from tests.support.launch import TRAIN_MANY, torchrun
from tests.support.training import (
    COMMON,
    DETACHED_HEADS,
    EVALUATING,
    ITERATIONS,
    LLAMA,
    SCRIPTS,
    losses,
    validation_losses,
)

KINDS = {
    "dense": "--no-gradient-accumulation-fusion",
    "Megatron-FSDP": "--use-tiled-linear --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor",
    "torch FSDP2": "--use-tiled-linear --use-torch-fsdp2 --no-gradient-accumulation-fusion",
}
FSDPS = tuple(KINDS)[1:]
#: Without tiles. Megatron-FSDP clips detached heads by the common norm.
STOCK = {"stock Megatron-FSDP": f"{KINDS['dense']} {KINDS['Megatron-FSDP'].removeprefix('--use-tiled-linear ')}"}
#: Tiles of a row or two, which cannot all be shared by two ranks.
TOO_SMALL = f"{KINDS['torch FSDP2']} --tiled-linear-splits qkv=1x72 --load /nowhere --save-wgrads-interval 9"
GELU = "--untie-embeddings-and-output-weights --position-embedding-type rope"
NO_DROPOUT = "--hidden-dropout 0"  # Megatron-FSDP gives all tensor-parallel ranks one random state, dense ones too
#: Ranks, flags of all runs, flags of the tiled ones.
LAYOUTS = {
    "DP=2": (2, f"--global-batch-size 8 {LLAMA}", "--tiled-linear-modules qkv fc1 fc2 output"),
    "TP=2, DP=2": (
        4,
        f"--global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel {GELU} {NO_DROPOUT}",
        "",
    ),
    "DP=2, detached next-token heads": (2, f"--global-batch-size 8 {GELU} {DETACHED_HEADS}", ""),
}
WITHOUT_HEADS = [name for name, (_, flags, _) in LAYOUTS.items() if DETACHED_HEADS not in flags]


@pytest.fixture(scope="module", params=LAYOUTS)
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every kind of run prints on rank 0 and on the last rank, which has the losses."""
    world, flags, tiling = LAYOUTS[request.param]
    kinds = KINDS | (STOCK if DETACHED_HEADS in flags else {"too small": TOO_SMALL})
    folder = tmp_path_factory.mktemp("fsdp")
    runs = [
        {
            "name": kind,
            "log": str(folder / kind),
            "gathered": True,
            "env": {} if kind == "dense" else {"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
            "argv": [
                *[str(SCRIPTS / "pretrain_gpt.py"), *COMMON, *EVALUATING, *flags.split(), *extra.split()],
                *([] if kind == "dense" else tiling.split()),
                *["--train-iters", str(ITERATIONS)],
            ],
        }
        for kind, extra in kinds.items()
    ]
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    torchrun(TRAIN_MANY, file, world=world)
    return {kind: "".join(Path(folder, f"{kind}.{rank}").read_text() for rank in {0, world - 1}) for kind in kinds}


def gradient_norms(log: str) -> list[float]:
    return [float(norm) for norm in re.findall(r"gradient norm: (\S+)", log)]


@pytest.mark.feature("training: {kind}, tiles sharded, {logs}")
@pytest.mark.parametrize("kind", FSDPS)
def test_it_trains_as_dense_and_gathers_two_tiles(kind: str, logs: dict[str, str]) -> None:
    stock = logs.get(f"stock {kind}", logs["dense"])
    dense, tiled = losses(stock), losses(logs[kind])
    assert len(dense) == ITERATIONS, stock[-3000:]
    assert len(tiled) == ITERATIONS, logs[kind][-3000:]
    assert dense[-1] < dense[0] - 0.3, "it learns nothing: equal losses would say little"
    assert max(abs(a - b) for a, b in zip(dense, tiled, strict=True)) <= 2e-5
    evaluated = validation_losses(stock)
    assert len(evaluated) == ITERATIONS // int(EVALUATING[1]) + 2
    assert validation_losses(logs[kind]) == pytest.approx(evaluated, abs=2e-5, rel=0)
    norms, tiled_norms = gradient_norms(stock), gradient_norms(logs[kind])
    assert tiled_norms == pytest.approx(norms, rel=2e-5)
    assert len(norms) == 2 * ITERATIONS
    assert re.search(r"linear_fc1 +2 .* 1x4 .* partitioned", logs[kind])
    pattern = r"gathered at most (\d+) units, (\d+) bytes, (\d+) with the rest; largest unit (\d+)"
    for units, size, _, largest in re.findall(pattern, logs[kind]):
        assert 1 <= int(units) <= 2
        assert int(size) <= 2 * int(largest)
    assert len(re.findall(pattern, logs[kind])) == 2


@pytest.mark.parametrize("logs", WITHOUT_HEADS, indirect=True)
def test_tiles_that_leave_a_rank_without_rows_are_refused(logs: dict[str, str]) -> None:
    lines = [line for line in logs["too small"].splitlines() if "leave some of 2 data-parallel ranks" in line]
    assert len(lines) == 2, logs["too small"][-3000:]
    assert all(line.startswith("megatron_tiling: decoder.layers.0.self_attention.linear_qkv") for line in lines)
    assert "Traceback" not in logs["too small"]


@pytest.mark.parametrize("logs", WITHOUT_HEADS, indirect=True)
def test_a_run_that_saves_gradients_says_that_tiles_show_there(logs: dict[str, str]) -> None:
    said = "--save-wgrads-interval, --save-params-interval: partitioned tiles keep names of their own"
    assert said in logs["too small"]
    assert said not in logs["torch FSDP2"]

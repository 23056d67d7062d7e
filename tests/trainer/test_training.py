"""Whole training runs on the stock trainer: the loss of tiled equals dense, in every parallel layout.

The script is this repository's examples/gpt/pretrain_gpt.py, or with MEGATRON_LM_SCRIPTS=FOLDER an unmodified
pretrain_gpt.py of a Megatron-LM tree.
"""

import json
import re
from dataclasses import dataclass, field
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
    gradient_norms,
    losses,
    validation_losses,
)

ALL = "--use-tiled-linear --tile-factor 4 --tiled-linear-modules all"


@dataclass
class Layout:
    """Flags of both runs, of the tiled one alone, and what the tiled run's table must hold."""

    name: str
    world: int
    flags: str
    tiling: str = ALL
    table: dict[str, str] = field(default_factory=dict)
    dense_flags: str = "--no-gradient-accumulation-fusion"
    tolerance: float = 2e-5


ATTENTION = {"self_attention.linear_qkv": "1x4", "self_attention.linear_proj": "4x1"}
MLP = {"mlp.linear_fc1": "1x4", "mlp.linear_fc2": "4x1"}
LAYOUTS = [
    Layout(
        "GELU, bias, tied, TP=2", 2, "--tensor-model-parallel-size 2", table=ATTENTION | MLP | {"output_layer": "-"}
    ),
    Layout(
        "Llama, sequence parallel, factor 3",
        2,
        f"--tensor-model-parallel-size 2 --sequence-parallel {LLAMA}",
        f"{ALL} --tile-factor 3",
        {"self_attention.linear_qkv": "1x3", "mlp.linear_fc1": "1x3", "mlp.linear_fc2": "3x1", "output_layer": "-"},
    ),
    Layout(
        "factor 8, no fusion, own grid",
        2,
        f"--tensor-model-parallel-size 2 --no-gradient-accumulation-fusion {LLAMA}",
        "--use-tiled-linear --tile-factor 8 --tiled-linear-modules fc1 fc2 proj --tiled-linear-splits fc1=2x4",
        {
            "mlp.linear_fc1": "2x4",
            "mlp.linear_fc2": "8x1",
            "self_attention.linear_qkv": "dense",
            "output_layer": "dense",
        },
    ),
    Layout("DP=2, factor 1", 2, "", f"{ALL} --tile-factor 1", {"mlp.linear_fc1": "1x1"}),
    Layout(
        "DP=2, distributed optimizer with overlap",
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "--use-tiled-linear",
        MLP | dict.fromkeys(ATTENTION, "dense"),
    ),
    Layout(
        "experts, shared expert, sequence parallel",
        2,
        f"--tensor-model-parallel-size 2 --sequence-parallel {LLAMA} --num-experts 4 --moe-router-topk 2 "
        "--moe-token-dispatcher-type allgather --moe-ffn-hidden-size 80 --moe-shared-expert-intermediate-size 48",
        table={
            "mlp.experts.local_experts.*.linear_fc1": "1x4",
            "mlp.experts.local_experts.*.linear_fc2": "4x1",
            "mlp.shared_experts.linear_fc1": "1x4",
        },
    ),
    Layout(
        "expert parallel",
        2,
        f"{LLAMA} --expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 80 "
        "--moe-token-dispatcher-type allgather",
        table={"mlp.experts.local_experts.*.linear_fc1": "1x4"},
    ),
    Layout(
        "next-token heads",
        2,
        "--tensor-model-parallel-size 2 --mtp-num-layers 1 --position-embedding-type rope "
        "--untie-embeddings-and-output-weights",
        table=ATTENTION | MLP | {"mtp.layers.*.eh_proj": "dense", "mtp.layers.*.mtp_model_layer.mlp.linear_fc1": "1x4"},
    ),
    Layout(
        "detached next-token heads, tiles partitioned",
        2,
        f"--tensor-model-parallel-size 2 {DETACHED_HEADS} --position-embedding-type rope "
        "--untie-embeddings-and-output-weights",
        f"{ALL} --tiled-linear-storage partitioned",
        ATTENTION | MLP | {"mtp.layers.*.mtp_model_layer.mlp.linear_fc1": "1x4"},
    ),
    Layout(
        "full recompute, float32 accumulation, bf16",
        2,
        f"--tensor-model-parallel-size 2 {LLAMA} --bf16 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        f"{ALL} --tiled-linear-fp32-accumulate",
        ATTENTION | MLP,
        tolerance=2e-2,
    ),
    Layout(
        "fp16, loss scaling",
        2,
        f"--tensor-model-parallel-size 2 {LLAMA} --fp16 --initial-loss-scale 1024",
        table=ATTENTION | MLP,
        tolerance=5e-3,
    ),
    Layout(
        "--spec, sequence parallel",
        2,
        f"--tensor-model-parallel-size 2 --sequence-parallel --no-gradient-accumulation-fusion {LLAMA}",
        "--spec megatron_tiling.spec tiled_layer_spec",
    ),
    Layout("TP=2, PP=2", 4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", table=ATTENTION | MLP),
    Layout(
        "virtual pipeline",
        4,
        f"--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 4 "
        f"--num-layers-per-virtual-pipeline-stage 1 {LLAMA}",
        table=ATTENTION | MLP,
    ),
]


def run_all(world: int, folder: Path) -> None:
    """Every layout of a world size, dense and tiled, under one torchrun."""
    runs = []
    for index, layout in enumerate(layout for layout in LAYOUTS if layout.world == world):
        for kind, extra in (("dense", layout.dense_flags), ("tiled", layout.tiling)):
            flags = [*COMMON, *EVALUATING, *layout.flags.split(), *extra.split(), "--train-iters", str(ITERATIONS)]
            flags += ["--global-batch-size", "4"]
            runs.append(
                {
                    "name": f"{layout.name}, {kind}",
                    "log": str(folder / f"{world}.{index}.{kind}"),
                    "argv": [str(SCRIPTS / "pretrain_gpt.py"), *flags],
                }
            )
    file = folder / f"{world}.json"
    file.write_text(json.dumps(runs))
    torchrun(TRAIN_MANY, file, world=world)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for world in sorted({layout.world for layout in LAYOUTS}):
        run_all(world, folder)
    return folder


def read(logs: Path, layout: Layout, kind: str) -> str:
    index = [other for other in LAYOUTS if other.world == layout.world].index(layout)
    return "".join(Path(logs, f"{layout.world}.{index}.{kind}.{rank}").read_text() for rank in range(layout.world))


def gemms(log: str) -> list[int]:
    return [int(count) for count in re.findall(r"GEMMs: (\d+)", log)]


def tiles(log: str) -> list[int]:
    """Tiles that a step runs one by one, forward, in dgrad and in wgrad, by each startup table.

    Those of an MLP and of the output layer are left out: their loops merge some of them.
    """
    tables = log.split("megatron_tiling: tiled linear layers")[1:]
    rows = [re.findall(r"^\S+ +(\d+) +\d+ x \d+ +(\d+)x(\d+) +[\d.]+$", table, re.M) for table in tables]
    return [sum(int(layers) * int(i) * int(o) for layers, i, o in table) for table in rows]


@pytest.mark.feature("training: {layout.name}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_equals_dense(layout: Layout, logs: Path) -> None:
    dense_log, tiled_log = read(logs, layout, "dense"), read(logs, layout, "tiled")
    dense, tiled = losses(dense_log), losses(tiled_log)
    assert len(dense) == ITERATIONS, dense_log[-3000:]
    assert len(tiled) == ITERATIONS, tiled_log[-3000:]
    assert dense[-1] < dense[0] - 0.3, "it learns nothing: equal losses would say little"
    difference = max(abs(a - b) for a, b in zip(dense, tiled, strict=True))
    assert difference <= layout.tolerance, f"largest difference {difference:.1e}"
    norms = gradient_norms(dense_log)
    assert len(norms) == ITERATIONS
    assert gradient_norms(tiled_log) == pytest.approx(norms, abs=2e-3, rel=10 * layout.tolerance)
    evaluated = validation_losses(dense_log)
    assert len(evaluated) == ITERATIONS // int(EVALUATING[1]) + 2
    assert validation_losses(tiled_log) == pytest.approx(evaluated, abs=layout.tolerance, rel=0)
    for module, grid in layout.table.items():
        assert re.search(rf"{re.escape(module)} +\d+ +\d+ x \d+ +{grid} ", tiled_log), f"{module} is not {grid}"
    assert gemms(dense_log) == [0] * layout.world
    assert len(gemms(tiled_log)) == layout.world
    assert min(gemms(tiled_log)) >= 3 * ITERATIONS * max(1, min(tiles(tiled_log), default=0))

"""Runs of the stock trainer on GPUs, with its default TransformerEngine layers: tiled against dense, in bf16."""

import importlib.util
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.support.hosts import torchrun
from tests.support.training import SCRIPTS, losses

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(
    not GPUS or importlib.util.find_spec("transformer_engine") is None, reason="needs a GPU and TransformerEngine"
)

COMMON = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --num-layers 2 --hidden-size 256 --ffn-hidden-size 704
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --seq-length 128
    --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --bf16 --lr 2e-3
    --min-lr 1e-4 --lr-decay-style cosine --seed 7 --hidden-dropout 0 --attention-dropout 0 --log-interval 1
    --eval-interval 10 --eval-iters 2
""".split()
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-grouped-gemm --moe-ffn-hidden-size 128 --moe-token-dispatcher-type "
    "alltoall --moe-shared-expert-intermediate-size 128"
)
PRECISION_AWARE = "--use-distributed-optimizer --use-precision-aware-optimizer"
#: By name: GPUs, and flags of both runs.
LAYOUTS = {
    "Llama": (1, ""),
    "GPT, biases, tied": (1, "--normalization LayerNorm"),
    "QK norms": (1, "--qk-layernorm"),
    "next-token heads": (1, "--mtp-num-layers 1"),
    "multi-latent attention": (1, "--multi-latent-attention"),
    "grouped and shared experts": (1, EXPERTS),
    "shared experts, overlapped": (1, f"{EXPERTS} --moe-shared-expert-overlap"),
    "full recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective recompute": (1, "--recompute-granularity selective --recompute-modules core_attn mlp layernorm"),
    "precision-aware optimizer": (
        1,
        f"{PRECISION_AWARE} --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    ),
    "optimizer offloaded to the CPU": (1, f"{PRECISION_AWARE} --optimizer-cpu-offload"),
    "distributed optimizer": (1, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "CUDA graphs of Megatron": (1, "--cuda-graph-impl local --te-rng-tracker"),
    "CUDA graphs of TransformerEngine": (1, "--cuda-graph-impl transformer_engine --te-rng-tracker"),
    "TP=2, sequence parallel, distributed optimizer": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "TP=2, communication overlapped": (2, "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
    "FP8": (1, "--fp8-format hybrid --fp8-recipe tensorwise"),
    "experts, EP=2": (2, f"{EXPERTS} --expert-model-parallel-size 2"),
    "experts, their TP=2": (
        2,
        f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
    ),
    "CP=2": (2, "--context-parallel-size 2"),
    "CP=2, all-gathered": (2, "--context-parallel-size 2 --cp-comm-type all_gather"),
}
#: Context parallelism needs an attention kernel that goes with it.
ATTENTION = {name: "flash" if name.startswith("CP") else "unfused" for name in LAYOUTS}


def lacks_flash_attention() -> bool:
    """Whether TransformerEngine (2.20 or newer with flash-attn-4, any with flash-attn 2 or 3) finds none."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils as Found

    takes_4 = Version(version("transformer_engine")) >= Version("2.20") and Found.v4_is_installed
    return not (takes_4 or Found.is_installed or Found.v3_is_installed)


#: Flags of ``COMMON`` that a layout does not want.
WITHOUT = {
    "GPT, biases, tied": "--disable-bias-linear --untie-embeddings-and-output-weights",
    "multi-latent attention": "--group-query-attention --num-query-groups 2",
}
#: Flags of the tiled run, where they are not all modules.
TILING = {"Llama": "", "FP8": "", "TP=2, communication overlapped": ""}
ALL = "--tile-factor 4 --tiled-linear-modules all"
#: Words of the table's lines about layers that stay TransformerEngine's.
STAYS = {"Llama": "not in --tiled-linear-modules", "TP=2, communication overlapped": "--tp-comm-overlap: "}
#: Of a loss, in bf16 and over 20 steps. A token close to two experts goes to the other one after a rounding.
TOLERANCE, LOOSER = 5e-3, 2e-2


def train(name: str, kind: str, extra: Iterable[str], folder: Path) -> str:
    """The log of a run of a layout, by the name of ``kind`` in ``folder``."""
    world, flags = LAYOUTS[name]
    log = folder / kind
    common = " ".join(COMMON).replace(WITHOUT.get(name, "nothing"), "").split()
    command = ["-m", "megatron_tiling", str(SCRIPTS / "pretrain_gpt.py"), *common, *flags.split(), *extra]
    command += ["--attention-backend", ATTENTION[name]]
    connections = "1" if world > 1 else "8"
    # Userbuffers without NVLink's multicast, which not every machine has.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": connections, "UB_SKIPMC": "1"}
    with log.open("w") as output:
        status = torchrun(command, world, environment, output=output, seconds=400)
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


def evaluated(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"validation loss at .*?lm loss value: ([0-9.E+-]+)", log)]


@pytest.mark.feature("training on TransformerEngine: {name}")
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_dense(name: str, tmp_path: Path) -> None:
    if LAYOUTS[name][0] > GPUS:
        pytest.skip(f"needs {LAYOUTS[name][0]} GPUs")
    if ATTENTION[name] == "flash" and lacks_flash_attention():
        pytest.skip("needs flash attention that TransformerEngine takes")
    dense = train(name, "dense", (), tmp_path)
    tiled = train(name, "tiled", f"--use-tiled-linear {TILING.get(name, ALL)}".split(), tmp_path)
    tolerance = LOOSER if "experts" in name or "FP8" in name else TOLERANCE
    expected, found = losses(dense), losses(tiled)
    assert len(expected) == len(found) == 20
    assert found == pytest.approx(expected, rel=tolerance)
    expected, found = evaluated(dense), evaluated(tiled)
    assert len(expected) == len(found) >= 2
    assert found == pytest.approx(expected, rel=tolerance)
    assert re.search("^output_layer .* loss in tiles of ", tiled, re.MULTILINE)
    assert STAYS.get(name, "") in tiled


#: By name: the run that a resumed one goes on from, and its flags.
RESUMED = {
    "tiled from dense": ("dense", f"--use-tiled-linear {ALL}"),
    "dense from tiled": ("tiled", ""),
    "tiled from tiled": ("tiled", f"--use-tiled-linear {ALL}"),
    "other tiles from tiled": ("tiled", "--use-tiled-linear --tile-factor 8"),
}
SAVED_AT = 10


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Logs of two runs that save in the middle, and of those that go on from there."""
    folder = tmp_path_factory.mktemp("resumed")
    name = "distributed optimizer"

    def flags(kind: str) -> list[str]:
        return ["--save", str(folder / f"saved {kind}"), "--save-interval", str(SAVED_AT)]

    logs = {"dense": train(name, "dense", flags("dense"), folder)}
    logs["tiled"] = train(name, "tiled", [*flags("tiled"), "--use-tiled-linear", *ALL.split()], folder)
    for kind, (source, extra) in RESUMED.items():
        load = ["--load", str(folder / f"saved {source}"), "--ckpt-step", str(SAVED_AT)]
        logs[kind] = train(name, kind, [*load, *extra.split()], folder)
    return logs


@pytest.mark.feature("checkpoints of TransformerEngine's layers and its FusedAdam: {name}")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, resumed: dict[str, str]) -> None:
    """Distributed optimizer: parameters, ``_extra_state`` and moments are those of the run that saved."""
    expected, found = losses(resumed[RESUMED[name][0]]), losses(resumed[name])
    assert len(expected) == 2 * SAVED_AT and len(found) == SAVED_AT
    expected = expected[SAVED_AT:]
    del expected[1], found[1]  # what is logged second after a start is a mean of two iterations
    if name == "tiled from tiled":
        assert found == expected  # to the last digit that is logged
    else:
        assert found == pytest.approx(expected, rel=5e-4 if name == "other tiles from tiled" else TOLERANCE)
        assert found[0] == pytest.approx(expected[0], rel=2e-4)

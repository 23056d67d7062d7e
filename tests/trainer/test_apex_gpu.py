"""Runs of the stock trainer on a GPU with apex's kernels and no TransformerEngine: tiled against dense, in bf16.

Dense has apex's fused Adam, layer norm and weight gradients, and tiled the first two of these.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.support.hosts import torchrun
from tests.support.training import SCRIPTS, losses

KERNELS = ("apex", "amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not all(map(importlib.util.find_spec, KERNELS))
    or importlib.util.find_spec("transformer_engine") is not None,
    reason="needs a GPU, apex's kernels, and no TransformerEngine, whose Adam Megatron would take",
)

COMMON = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --num-layers 2 --hidden-size 256 --ffn-hidden-size 704
    --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 8
    --train-iters 20 --bf16 --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine --seed 7 --hidden-dropout 0
    --attention-dropout 0 --log-interval 1 --eval-interval 1000 --eval-iters 0 --transformer-impl local
    --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
""".split()
TILED = "--use-tiled-linear --tile-factor 4 --tiled-linear-modules all".split()
#: By name: the run that a resumed one goes on from, and its flags.
RESUMED = {
    "tiled from dense": ("dense", TILED),
    "dense from tiled": ("tiled", []),
    "tiled from tiled": ("tiled", TILED),
}
SAVED_AT = 10
#: Of a loss, in bf16 and over 20 steps.
TOLERANCE = 5e-3


def train(kind: str, extra: Iterable[str], folder: Path) -> list[float]:
    """Losses of a run, whose log has the name of ``kind``."""
    log = folder / kind
    command = ["-m", "megatron_tiling", str(SCRIPTS / "pretrain_gpt.py"), *COMMON, *extra]
    with log.open("w") as output:
        status = torchrun(command, 1, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, output=output, seconds=400)
    assert status == 0, log.read_text()[-4000:]
    assert ("megatron_tiling: tiled linear layers" in log.read_text()) == ("--use-tiled-linear" in extra)
    return losses(log.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of two runs that save in the middle, and of those that go on from there."""
    folder = tmp_path_factory.mktemp("apex")
    found = {}
    for kind, flags in (("dense", []), ("tiled", TILED)):
        saves = ["--save", str(folder / f"saved {kind}"), "--save-interval", str(SAVED_AT)]
        found[kind] = train(kind, [*saves, *flags], folder)
    for kind, (source, flags) in RESUMED.items():
        load = ["--load", str(folder / f"saved {source}"), "--ckpt-step", str(SAVED_AT)]
        found[kind] = train(kind, [*load, *flags], folder)
    return found


def test_megatron_takes_apex() -> None:
    import megatron.core.optimizer
    from megatron.core.tensor_parallel import layers

    assert megatron.core.optimizer.Adam.__module__.startswith("apex.")
    assert layers._grad_accum_fusion_available


@pytest.mark.feature("training on apex's kernels, without TransformerEngine")
def test_losses_equal_dense(runs: dict[str, list[float]]) -> None:
    assert len(runs["dense"]) == 2 * SAVED_AT
    assert runs["tiled"] == pytest.approx(runs["dense"], rel=TOLERANCE)


@pytest.mark.feature("checkpoints of local layers and apex's FusedAdam: {name}")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, runs: dict[str, list[float]]) -> None:
    """Distributed optimizer: parameters and moments are those of the run that saved."""
    expected, found = runs[RESUMED[name][0]][SAVED_AT:], runs[name]
    assert len(found) == SAVED_AT
    del expected[1], found[1]  # what is logged second after a start is a mean of two iterations
    if name == "tiled from tiled":
        assert found == expected  # to the last digit that is logged
    else:
        assert found == pytest.approx(expected, rel=TOLERANCE)
        assert found[0] == pytest.approx(expected[0], rel=2e-4)

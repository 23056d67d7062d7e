"""What training runs of the suite share: the script, its flags, and the losses in a log."""

import os
import re
from pathlib import Path

from tests.support.launch import EXAMPLES

SCRIPTS = Path(os.environ.get("MEGATRON_LM_SCRIPTS", EXAMPLES))
ITERATIONS = int(os.environ.get("MEGATRON_TILING_ITERATIONS", "20"))

COMMON = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-layers 2 --hidden-size 48
    --num-attention-heads 4 --ffn-hidden-size 80 --seq-length 24 --max-position-embeddings 24 --micro-batch-size 2
    --lr 4e-3 --min-lr 1e-3 --lr-decay-style cosine --seed 7 --hidden-dropout 0.1 --attention-dropout 0
    --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion
    --eval-interval 1000000 --eval-iters 0 --log-interval 1 --distributed-timeout-minutes 5
""".split()
EVALUATING = "--eval-interval 6 --eval-iters 2".split()  # stands behind COMMON
LLAMA = "--swiglu --disable-bias-linear --normalization RMSNorm --group-query-attention --num-query-groups 2 " \
    "--position-embedding-type rope --untie-embeddings-and-output-weights"  # fmt: skip

#: Their gradients have a norm of their own, and are clipped by it.
DETACHED_HEADS = "--mtp-num-layers 1 --mtp-detach-heads --mtp-loss-scaling-factor 2.0 --clip-grad 0.05"


def validation_losses(log: str) -> list[float]:
    """Of each evaluation on the way, and of the two at the end, on the validation and the test set."""
    return [float(loss) for loss in re.findall(r"lm loss value: ([0-9.E+-]+)", log)]


def gradient_norms(log: str) -> list[float]:
    """Of each step, to three decimals."""
    return [float(norm) for norm in re.findall(r"grad norm: ([0-9.]+)", log)]


def losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", log)]

r"""Loss curves of dense and tiled training, side by side, through the stock trainer.

    python -m benchmarks.loss_parity --script PRETRAIN_GPT --data PREFIX --tokenizer-model MODEL \
        --tensor-parallel 2 4 --output FOLDER

Each tensor-parallel size trains a bf16 Llama-style GPT with the same seed and data, dense and tiled. The yardstick
is a second dense run with half the micro-batch: it differs from the first by nothing but the order of sums. Tiled
runs come without and with gradient accumulation fusion, which adds weight gradients in float32 where dense, without
apex, rounds each to bf16. Writes loss_parity.md and, with matplotlib, loss_parity.png.
"""

import argparse
import os
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.record import Origin, machine

MODEL = """
    --num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --group-query-attention
    --num-query-groups 4 --seq-length 1024 --max-position-embeddings 1024 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 4 --global-batch-size 8 --bf16
    --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 10 --clip-grad 1.0 --seed 1234
    --transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --eval-interval 1000000 --eval-iters 0 --log-interval 1 --split 990,10,0
    --tokenizer-type GPTSentencePieceTokenizer
""".split()
PLAIN = "--no-gradient-accumulation-fusion"
KINDS = {
    "dense": [PLAIN],
    "dense, half the micro-batch": [PLAIN, "--micro-batch-size", "2"],
    "tiled, no fusion": ["--use-tiled-linear", PLAIN],
    "tiled": ["--use-tiled-linear"],
}


def train(args: argparse.Namespace, tp: int, kind: str, places: "queue.Queue[int]") -> list[float]:
    """Losses of one run on ``tp`` GPUs from a free place on; its log is left in the output folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)]
    command += ["-m", "megatron_tiling", str(args.script), *MODEL, "--tensor-model-parallel-size", str(tp)]
    command += ["--train-iters", str(args.iterations), "--data-path", args.data, "--data-cache-path", args.cache]
    command += ["--tokenizer-model", args.tokenizer_model, *KINDS[kind]]
    log = args.output / f"loss_parity.tp{tp}.{kind.replace(', ', '_').replace(' ', '_')}.log"
    first_gpu = places.get()
    environment = os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(str(first_gpu + rank) for rank in range(tp)),
        "PYTHONWARNINGS": "ignore",
    }
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    places.put(first_gpu)
    text = log.read_text()
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", text)]
    if status or len(losses) != args.iterations:
        raise SystemExit(f"{kind} at TP={tp} failed (exit {status}, {len(losses)} losses): {log}\n{text[-3000:]}")
    if ("megatron_tiling: tiled linear layers" in text) != kind.startswith("tiled"):
        raise SystemExit(f"{kind} at TP={tp}: the startup table says otherwise: {log}")
    return losses


def train_all(args: argparse.Namespace) -> dict[tuple[int, str], list[float]]:
    """All kinds at all sizes, side by side where there are GPUs for it."""
    curves = {}
    for tp in args.tensor_parallel:
        places: queue.Queue[int] = queue.Queue()
        for first_gpu in range(0, torch.cuda.device_count() - tp + 1, tp):
            places.put(first_gpu)
        with ThreadPoolExecutor(places.qsize()) as pool:
            runs = {kind: pool.submit(train, args, tp, kind, places) for kind in KINDS}
            curves |= {(tp, kind): run.result() for kind, run in runs.items()}
    return curves


def difference(a: list[float], b: list[float]) -> str:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return f"{max(gaps):.4f} | {sum(gaps) / len(gaps):.4f}"


def report(curves: dict[tuple[int, str], list[float]], args: argparse.Namespace) -> str:
    lines = [
        *Origin.now(("torch", "megatron-core"), machine(several=True)).head("Loss parity", "NCCL, bf16"),
        f"Largest and mean difference of the loss over {args.iterations} iterations:",
        "",
        "| against dense | largest | mean |",
        "|---|---|---|",
    ]
    lines += [
        f"| TP={tp} {kind} | {difference(curves[tp, 'dense'], curve)} |"
        for (tp, kind), curve in curves.items()
        if kind != "dense"
    ]
    lines += ["", "| run | first loss | last loss |", "|---|---|---|"]
    lines += [f"| TP={tp} {kind} | {curve[0]:.4f} | {curve[-1]:.4f} |" for (tp, kind), curve in curves.items()]
    return "\n".join(lines) + "\n"


def plot(curves: dict[tuple[int, str], list[float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib here: no picture")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (tp, kind), curve in curves.items():
        axes.plot(curve, label=f"TP={tp} {kind}", linestyle="--" if kind.startswith("tiled") else "-", linewidth=1)
    axes.set(xlabel="iteration", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of dense and tiled training, side by side.")
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx, from examples/gpt/prepare_data.py")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--cache", default="/tmp/loss_parity_cache", help="folder for Megatron's data set indices")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    curves = train_all(args)
    text = report(curves, args)
    (args.output / "loss_parity.md").write_text(text)
    plot(curves, args.output / "loss_parity.png")
    print(text)


if __name__ == "__main__":
    main()

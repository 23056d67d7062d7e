r"""Loss curves of dense and tiled training, side by side, through the stock trainer.

    python -m benchmarks.loss_parity --script PRETRAIN_GPT --data PREFIX --tokenizer-model MODEL \
        --tensor-parallel 2 4 --output FOLDER
    python -m benchmarks.loss_parity ... --fp8 tensorwise delayed blockwise --iterations 300 --at-once 9

Each tensor-parallel size trains a bf16 Llama-style GPT with the same seed and data, dense and tiled. The yardstick
is a second dense run with half the micro-batch: it differs from the first by nothing but the order of sums. Tiled
runs come without and with gradient accumulation fusion, which adds weight gradients in float32 where dense, without
apex, rounds each to bf16. One more has communication behind products, in 3 steps of tokens. All runs are under sequence
parallelism with ``--transformer-impl transformer_engine --sequence-parallel``; stock's local norm refuses it.

With ``--fp8`` a GPT of 306 million parameters trains on one GPU, on TransformerEngine's layers, in each recipe, with
two micro-batches of 2048 tokens an iteration. The yardstick is a dense run on the same documents in another order:
Megatron shuffles anew for another ``--split``, from the same seed, with the same initial weights.

Writes DATE-loss-parity.md (DATE-loss-parity-fp8.md) and, with matplotlib, a picture. ``--at-once`` runs share a GPU,
which the host would not fill. ``--resume`` goes on where one was cut off: it takes the logs of runs that ended, where
their commands are the same. Flags that are not its own go to Megatron.
"""

import argparse
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.arguments import output_folder, positive
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
TILED = "--use-tiled-linear --tile-factor 4".split()
KINDS = {
    "dense": [PLAIN],
    "dense, half the micro-batch": [PLAIN, "--micro-batch-size", "2"],
    "tiled, no fusion": [*TILED, PLAIN],
    "tiled": TILED,
}
OVERLAP, OVERLAPS = "tiled, overlap", "communication behind products"  # a run's kind, and what its table says
FINISHED = "[after training is done]"  # in the log of a run that was not cut off
#: Beside ``KINDS`` where there is communication. A micro-batch has 4096 tokens, which make 3 steps.
PARALLEL_KINDS = {OVERLAP: ["--use-tiled-linear", "--tiled-tp-overlap", "3"]}


#: Flags that stand behind ``MODEL``: the last one counts.
FP8_MODEL = """
    --num-layers 6 --hidden-size 2048 --ffn-hidden-size 6144 --micro-batch-size 2 --global-batch-size 4
    --transformer-impl transformer_engine --attention-backend unfused --fp8-format hybrid
    --lr 2e-4 --min-lr 2e-5 --lr-warmup-iters 50
""".split()
OTHER_ORDER = "dense, other order of data"
FP8_KINDS = {
    "dense": [],
    OTHER_ORDER: ["--split", "985,15,0"],
    "tiled": TILED,
}
LAST = 50  # iterations, of whose losses a mean is taken


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        group: runs of a group are compared with its dense one.
        kind: what is special about it.
        gpus: its tensor-parallel size.
        flags: behind those of ``MODEL``.
    """

    group: str
    kind: str
    gpus: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.group} {self.kind}"


def runs_of(args: argparse.Namespace) -> Iterator[Run]:
    for tp in [] if args.fp8 else args.tensor_parallel:
        for kind, flags in (KINDS | (PARALLEL_KINDS if tp > 1 else {})).items():
            if kind == "dense" or not args.kinds or kind in args.kinds:
                yield Run(f"TP={tp}", kind, tp, tuple(flags))
    for recipe in args.fp8:
        for kind, flags in FP8_KINDS.items():
            yield Run(f"FP8 {recipe}", kind, 1, (*FP8_MODEL, "--fp8-recipe", recipe, *flags))


def train(args: argparse.Namespace, run: Run, places: "queue.Queue[int]") -> list[float]:
    """Losses of one run on GPUs from a free place on; its log is left in the output folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.gpus)]
    command += ["-m", "megatron_tiling", str(args.script), *MODEL, "--tensor-model-parallel-size", str(run.gpus)]
    command += ["--train-iters", str(args.iterations), "--data-path", args.data, "--data-cache-path", args.cache]
    command += ["--tokenizer-model", args.tokenizer_model, *run.flags, *args.more]
    log = args.output / f"loss_parity.{re.sub('[^a-zA-Z0-9=]+', '_', run.name)}.log"
    begin = f"{shlex.join(command)}\n"  # of the log
    if args.resume and log.exists():
        found = log.read_text()
        if found.startswith(begin) and FINISHED in found:
            return losses_of(log, run, args.iterations, status=0)
    first_gpu = places.get()
    environment = os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(str(first_gpu + rank) for rank in range(run.gpus)),
        "PYTHONWARNINGS": "ignore",
    }
    with log.open("w") as file:
        file.write(begin)
        file.flush()
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    places.put(first_gpu)
    return losses_of(log, run, args.iterations, status)


def losses_of(log: Path, run: Run, iterations: int, status: int) -> list[float]:
    """Of a run that ended with ``status``.

    Raises:
        SystemExit: it failed, or it was not what it is called.
    """
    text = log.read_text()
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", text)]
    if status or len(losses) != iterations:
        raise SystemExit(f"{run.name} failed (exit {status}, {len(losses)} losses): {log}\n{text[-3000:]}")
    if ("megatron_tiling: tiled linear layers" in text) != run.kind.startswith("tiled"):
        raise SystemExit(f"{run.name}: the startup table says otherwise: {log}")
    if run.kind == OVERLAP and OVERLAPS not in text:
        raise SystemExit(f"{run.name}: the startup table says nothing of {OVERLAPS}: {log}")
    return losses


def train_all(args: argparse.Namespace) -> dict[Run, list[float]]:
    """All runs, side by side where there are GPUs for it."""
    runs = list(runs_of(args))
    curves = {}
    for gpus in sorted({run.gpus for run in runs}):
        places: queue.Queue[int] = queue.Queue()
        for first_gpu in range(0, max(1, torch.cuda.device_count()) - gpus + 1, gpus):
            for _ in range(args.at_once):
                places.put(first_gpu)
        with ThreadPoolExecutor(places.qsize()) as pool:
            found = {run: pool.submit(train, args, run, places) for run in runs if run.gpus == gpus}
            curves |= {run: future.result() for run, future in found.items()}
    return curves


def difference(a: list[float], b: list[float]) -> str:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return f"{max(gaps):.4f} | {sum(gaps) / len(gaps):.4f}"


def report(curves: dict[Run, list[float]], args: argparse.Namespace, origin: Origin, picture: Path | None) -> str:
    title, setting = ("Loss in FP8", "TransformerEngine's layers") if args.fp8 else ("Loss parity", "NCCL, bf16")
    dense = {run.group: curve for run, curve in curves.items() if run.kind == "dense"}
    lines = [
        *origin.head(title, setting),
        *([] if picture is None else [f"![loss curves]({picture.name})", ""]),
        f"Largest and mean difference of the loss over {args.iterations} iterations:",
        "",
        "| against dense of the same group | largest | mean |",
        "|---|---|---|",
    ]
    for run, curve in curves.items():
        if run.kind != "dense":
            lines.append(f"| {run.name} | {difference(dense[run.group], curve)} |")
    last = min(LAST, args.iterations)
    lines += ["", f"| run | first loss | last loss | mean of the last {last} | less dense's |", "|---|---|---|---|---|"]
    for run, curve in curves.items():
        mean, of_dense = (statistics.fmean(losses[-last:]) for losses in (curve, dense[run.group]))
        lines.append(f"| {run.name} | {curve[0]:.4f} | {curve[-1]:.4f} | {mean:.4f} | {mean - of_dense:+.4f} |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[Run, list[float]], path: Path) -> Path | None:
    """The picture, where it can be drawn."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib here: no picture")
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run, curve in curves.items():
        axes.plot(curve, label=run.name, linestyle="--" if run.kind.startswith("tiled") else "-", linewidth=1)
    axes.set(xlabel="iteration", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of dense and tiled training, side by side.")
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx, from examples/gpt/prepare_data.py")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--cache", default="/tmp/loss_parity_cache", help="folder for Megatron's data set indices")
    parser.add_argument("--tensor-parallel", type=positive, nargs="+", default=[2, 4])
    kinds = [kind for kind in (*KINDS, *PARALLEL_KINDS) if kind != "dense"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, metavar="KIND", help="of runs in bf16, beside dense")
    parser.add_argument("--fp8", nargs="+", default=[], metavar="RECIPE", help="train in FP8 on one GPU instead")
    parser.add_argument("--at-once", type=positive, default=1, help="runs that share a GPU")
    parser.add_argument("--iterations", type=positive, default=100)
    parser.add_argument(
        "--resume", action="store_true", help="runs whose logs in the output folder end are not made again"
    )
    parser.add_argument("--output", type=output_folder, required=True)
    args, args.more = parser.parse_known_args()  # more of Megatron's flags
    gpus = 1 if args.fp8 else max(args.tensor_parallel)
    if gpus > torch.cuda.device_count():
        parser.error(f"there are {torch.cuda.device_count()} GPUs, and runs want {gpus}")
    curves = train_all(args)
    packages = ("torch", "megatron-core", *["transformer_engine"] * bool(args.fp8))
    origin = Origin.now(packages, machine(several=True))
    path = args.output / f"{origin.date}-loss-parity{'-fp8' * bool(args.fp8)}.md"
    text = report(curves, args, origin, plot(curves, path.with_suffix(".png")))
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

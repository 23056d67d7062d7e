"""Step time and peak memory of whole training steps on the stock trainer, one GPU a run.

    python -m benchmarks.end_to_end --script PRETRAIN_GPT --output FOLDER [--gpus 4] [--only NAME ...]

Six Llama-style layers, h=4096, ffn=14336, 8 query groups, sequence 4096, micro-batch 1, global batch 4, bf16, local
implementation. Each candidate is a process of its own on one GPU; with several GPUs the candidates are spread over
them, and dense runs on each of them, so that every ratio is taken on one GPU.
"""

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import at_least, output_folder, positive
from benchmarks.record import Origin, machine

MODEL = """
    --num-layers 6 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1 --global-batch-size 4 --bf16
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --clip-grad 1.0 --seed 1234
    --transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --mock-data --tokenizer-type NullTokenizer
    --eval-interval 1000000 --eval-iters 0 --log-interval 1
""".split()
PLAIN = "--no-gradient-accumulation-fusion"
APEX = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
TILED = "--use-tiled-linear --tile-factor 4"
BODY = f"{TILED} --tiled-linear-modules qkv proj fc1 fc2"


@dataclass(frozen=True)
class Candidate:
    name: str
    vocabulary: int
    flags: str


SMALL, LARGE = 32000, 128256
CANDIDATES = [
    Candidate("dense", SMALL, PLAIN),
    *([Candidate("dense, fused by apex", SMALL, "")] if APEX else []),
    Candidate("dense, recompute mlp", SMALL, f"{PLAIN} --recompute-granularity selective --recompute-modules mlp"),
    Candidate("dense, mlp_chunks_for_training=4", SMALL, f"{PLAIN} --mlp-chunks-for-training 4"),
    Candidate("tiled but the output layer, keep all", SMALL, BODY),
    Candidate("tiled but the output layer, keep none", SMALL, f"{BODY} --tiled-mlp-keep 0"),
    Candidate("tiled but the output layer, keep all, no fusion", SMALL, f"{BODY} {PLAIN}"),
    Candidate("tiled, keep all", SMALL, TILED),
    Candidate("tiled, keep none", SMALL, f"{TILED} --tiled-mlp-keep 0"),
    Candidate("dense", LARGE, PLAIN),
    Candidate("tiled, keep all", LARGE, TILED),
    Candidate("tiled, keep none", LARGE, f"{TILED} --tiled-mlp-keep 0"),
]


@dataclass(frozen=True)
class Measurement:
    milliseconds: float
    mib: float
    last_loss: float


def run(candidate: Candidate, gpu: int, args: argparse.Namespace) -> Measurement | str:
    """Median of the steps after the warm-up, and the peak; or why there is neither."""
    flags = [*MODEL, *candidate.flags.split(), "--vocab-size", str(candidate.vocabulary - 1)]
    flags += ["--train-iters", str(args.iterations)]
    log = args.output / f"{candidate.name.replace(' ', '_')}.{candidate.vocabulary}.gpu{gpu}.log"
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[gpu],
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(29600 + gpu),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "megatron_tiling", str(args.script), *flags]
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    text = log.read_text()
    times = [float(time) for time in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)]
    peaks = re.findall(r"max allocated: ([0-9.]+)", text)
    losses = re.findall(r"lm loss: ([0-9.E+-]+)", text)
    if len(times) != args.iterations or not peaks:
        error = re.findall(r"^.*(?:Error|megatron_tiling:).*$", text, re.M)
        return error[-1][:150] if error else f"failed, see {log.name}"
    return Measurement(statistics.median(times[args.warm_up :]), float(peaks[-1]), float(losses[-1]))


def run_all(args: argparse.Namespace) -> list[tuple[Candidate, int, Measurement | str]]:
    """Every candidate on one GPU, beside dense of its vocabulary on the same GPU."""
    queues: list[list[Candidate]] = [[] for _ in range(args.gpus)]
    others = [one for one in CANDIDATES if one.name != "dense" and (not args.only or one.name in args.only)]
    for index, candidate in enumerate(others):
        queue = queues[index % args.gpus]
        dense = next(c for c in CANDIDATES if c.name == "dense" and c.vocabulary == candidate.vocabulary)
        queue += [candidate] if dense in queue else [dense, candidate]

    def work(gpu: int) -> list[tuple[Candidate, int, Measurement | str]]:
        return [(candidate, gpu, run(candidate, gpu, args)) for candidate in queues[gpu]]

    with ThreadPoolExecutor(args.gpus) as pool:
        return [row for rows in pool.map(work, range(args.gpus)) for row in rows]


def report(rows: list[tuple[Candidate, int, Measurement | str]], args: argparse.Namespace) -> str:
    origin = Origin.now(("torch", "megatron-core"), machine())
    lines = [
        *origin.head("Training steps end to end", f"one GPU a run, {args.gpus} runs side by side"),
        "No TransformerEngine. Dense runs without gradient accumulation fusion where it is not said.",
        f"Median of {args.iterations - args.warm_up} steps, against dense on the same GPU; peak of",
        "`torch.cuda.max_memory_allocated` over the run, as Megatron logs it.",
    ]
    for vocabulary in sorted({candidate.vocabulary for candidate, *_ in rows}):
        lines += [
            "",
            f"Vocabulary {vocabulary}:",
            "",
            "| | ms a step | time | peak MB | last loss | GPU |",
            "|---|---|---|---|---|---|",
        ]
        dense = {gpu: m for c, gpu, m in rows if c.name == "dense" and c.vocabulary == vocabulary}
        for candidate, gpu, measured in rows:
            if candidate.vocabulary != vocabulary:
                continue
            base = dense[gpu]
            if isinstance(measured, str) or isinstance(base, str):
                lines.append(f"| {candidate.name} | {measured if isinstance(measured, str) else base} | | | | {gpu} |")
                continue
            ratio = measured.milliseconds / base.milliseconds
            lines.append(
                f"| {candidate.name} | {measured.milliseconds:.1f} | {ratio:.3f} | {measured.mib:.0f} | "
                f"{measured.last_loss:.5f} | {gpu} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and peak memory on the stock trainer.")
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--output", type=output_folder, required=True)
    parser.add_argument("--gpus", type=positive, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="candidates, beside dense; by default all")
    parser.add_argument("--iterations", type=positive, default=20)
    parser.add_argument("--warm-up", type=at_least(0), default=5)
    args = parser.parse_args()
    if args.warm_up >= args.iterations:
        parser.error(f"--warm-up {args.warm_up}: must be less than --iterations {args.iterations}")
    text = report(run_all(args), args)
    (args.output / "end_to_end.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Dense and tiled training under Megatron-FSDP and torch FSDP2, through the stock trainer.

    python -m benchmarks.fsdp --script PRETRAIN_GPT --output FOLDER [--layouts dp2 tp2dp2] [--precisions fp32 bf16]
        [--hosts 2]

Four Llama-style layers, h=4096, ffn=14336, 8 query groups, vocabulary 32000, sequence 2048, global batch 8, local
implementation, tile factor 4. Dense and tiled start from the same weights and read the same data: in fp32 their
losses and gradient norms differ by the order of sums alone, in bf16 by its rounding too. Peak memory is PyTorch's,
from the first step on; gathered parameters are counted by tests/support/gathered.py. Writes fsdp.md. With
``--hosts 2``, four processes share two GPUs (tests/support/hosts.py).
"""

import argparse
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.arguments import output_folder, positive
from benchmarks.record import Origin, machine
from tests.support.hosts import torchrun

MODEL = """
    --num-layers 4 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --seq-length 2048 --max-position-embeddings 2048 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1 --global-batch-size 8
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 2 --clip-grad 1.0 --seed 1234
    --transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion --mock-data --tokenizer-type NullTokenizer --vocab-size 32000
    --eval-interval 1000000 --eval-iters 0 --log-interval 1
""".split()
LAYOUTS = {
    "dp2": (2, ""),
    "dp4": (4, ""),
    "tp2dp2": (4, "--tensor-model-parallel-size 2"),  # with sequence parallelism, dense wants the norm of apex or TE
}
FSDPS = {
    "Megatron-FSDP": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor",
    "torch FSDP2": "--use-torch-fsdp2",
}
KINDS = {
    "dense": "",
    "tiled": "--use-tiled-linear --tile-factor 4",
    "tiled, keep all": "--use-tiled-linear --tile-factor 4 --tiled-mlp-keep all",
    "tiled, keep all, grids as advised": "--use-tiled-linear --tile-factor 4 --tiled-mlp-keep all "
    "--tiled-linear-splits qkv=1x1 proj=1x1 output=1x3",  # by the startup table
}
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """What one training run printed on its ranks."""

    losses: list[float]
    norms: list[float]
    ms: float
    peak_mib: float
    units: int
    gathered_mib: float
    total_mib: float


def worker(arguments: list[str]) -> None:
    """One rank: the runner, counted."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    if not torch.cuda.is_available():
        from megatron_tiling import cpu

        cpu.install()
    from megatron_tiling import __main__ as runner
    from tests.support import gathered

    counted = gathered.watch()
    sys.argv = ["megatron_tiling", *arguments]
    runner.main()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(f"{counted}; peak memory {peak}", flush=True)


def train(args: argparse.Namespace, layout: str, fsdp: str, precision: str, kind: str) -> Run:
    """One run; its log is left in the output folder."""
    world, parallel = LAYOUTS[layout]
    command = [__file__, "--worker", str(args.script), *MODEL, *parallel.split(), *FSDPS[fsdp].split()]
    command += [*KINDS[kind].split(), "--train-iters", str(args.iterations)]
    command += ["--bf16"] if precision == "bf16" else []
    command += args.flags.split()
    name = "_".join(re.sub(r"\W+", "-", word) for word in (layout, fsdp, precision, kind))
    log = args.output / f"fsdp.{name}.log"
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        status = torchrun(command, world, environment, args.hosts, file)
    text = log.read_text()
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", text)]
    if status or len(losses) != args.iterations:
        raise SystemExit(f"{name} failed (exit {status}, {len(losses)} losses): {log}\n{text[-3000:]}")
    if ("megatron_tiling: tiled linear layers" in text) != kind.startswith("tiled"):
        raise SystemExit(f"{name}: the startup table says otherwise: {log}")
    # Every rank prints each step's norm, and none ends a step before all have begun it.
    norms = [float(norm) for norm in re.findall(r"gradient norm: ([0-9.e+-]+)", text)][::world]
    times = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)]
    pattern = r"gathered at most (\d+) units, (\d+) bytes, (\d+) with the rest; largest unit \d+; peak memory (\d+)"
    ranks = [[int(number) for number in found] for found in re.findall(pattern, text)]
    units, size, total, peak = (max(numbers) for numbers in zip(*ranks, strict=True))
    ms = statistics.median(times[len(times) // 2 :])
    return Run(losses, norms, ms, peak / MIB, units, size / MIB, total / MIB)


def row(kind: str, run: Run, dense: Run) -> str:
    loss = max(abs(a - b) for a, b in zip(run.losses, dense.losses, strict=True))
    norm = max(abs(a - b) / b for a, b in zip(run.norms, dense.norms, strict=True))
    return (
        f"| {kind} | {run.losses[0]:.5f} | {run.losses[-1]:.5f} | {loss:.1e} | {norm:.1e} | {run.ms:.0f} | "
        f"{run.ms / dense.ms:.3f} | {run.peak_mib:.0f} | {run.units} | {run.gathered_mib:.1f} | {run.total_mib:.1f} |"
    )


def report(args: argparse.Namespace, tables: dict[str, list[str]]) -> str:
    lines = [
        *Origin.now(("torch", "megatron-core"), machine()).head("FSDP"),
        f"{args.iterations} iterations. Differences are the largest over all of them, from dense under the same FSDP, "
        "of the gradient norm the relative one. Units are tiles (fc1 and fc2 tile of an MLP together), in dense runs "
        "layers; MiB are the largest of any rank.",
    ]
    head = [
        "| | first loss | last loss | loss difference | gradient norm difference | ms a step | time | peak MiB "
        "| units gathered at once | MiB of them | with the rest |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title, rows in tables.items():
        lines += ["", f"{title}:", "", *head, *rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description="Dense and tiled training under both FSDPs.")
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["dp2", "tp2dp2"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--fsdps", nargs="+", choices=FSDPS, default=list(FSDPS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=["tiled"])
    parser.add_argument("--iterations", type=positive, default=20)
    parser.add_argument("--hosts", type=positive, default=1, help="hosts that this one plays, sharing its GPUs")
    parser.add_argument("--flags", default="", help="more Megatron flags for every run, as one string")
    parser.add_argument("--output", type=output_folder, required=True)
    args = parser.parse_args()
    tables: dict[str, list[str]] = {}
    for layout in args.layouts:
        for fsdp in args.fsdps:
            for precision in args.precisions:
                rows = tables.setdefault(f"{layout}, {fsdp}, {precision}", [])
                dense = train(args, layout, fsdp, precision, "dense")
                rows.append(row("dense", dense, dense))
                for kind in args.kinds:
                    rows.append(row(kind, train(args, layout, fsdp, precision, kind), dense))
                    text = report(args, tables)
                    (args.output / "fsdp.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

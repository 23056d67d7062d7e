"""One training run handed from stock Megatron to tiled layers and back, over tensor-parallel sizes, in bf16.

    python -m benchmarks.finetune_parity --data PREFIX --tokenizer-model MODEL [--output DIR]

On 2 GPUs, without any on the CPU. Dense at TP=1 trains a Llama-style GPT and saves. From there on the rest of the run
is done four times: dense at TP=1 and at TP=2, tiled at TP=2, and tiled at TP=2 for the first half and then, from its
checkpoint, dense at TP=1. The yardstick is the difference between the two dense ones, which is nothing but rounding.
Writes DATE-finetune-parity.md and, with matplotlib, a picture. Flags after ``--`` go to every run.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.arguments import output_folder
from benchmarks.loss_parity import MODEL, PLAIN
from benchmarks.record import RESULTS, Origin, machine

TILED = "tiled, TP=2"
YARDSTICK = "dense, TP=2"
REFERENCE = "dense, TP=1"
HANDED_BACK = "tiled, TP=2, then dense, TP=1"
BASE = "dense, TP=1, before"


@dataclass(frozen=True)
class Run:
    """A training run from one iteration to another.

    Args:
        name: of its curve.
        tp: its tensor-parallel size, and its number of processes.
        start, end: first iteration that is not its own, last one that is.
        source: the run whose checkpoint at ``start`` it continues.
        save_at: the iteration after which it saves.
        tiled: whether its layers are.
    """

    name: str
    tp: int
    start: int
    end: int
    source: str = ""
    save_at: int = 0
    tiled: bool = False

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def stages(first: int, half: int, last: int) -> list[list[Run]]:
    """Runs in an order in which each finds its source; those of a stage run side by side."""
    return [
        [Run(BASE, 1, 0, first, save_at=first)],
        [Run(TILED, 2, first, last, source=BASE, save_at=half, tiled=True)],
        [Run(YARDSTICK, 2, first, last, source=BASE)],
        [Run(REFERENCE, 1, first, last, source=BASE), Run(HANDED_BACK, 1, half, last, source=TILED)],
    ]


def train(run: Run, place: int, args: argparse.Namespace) -> dict[int, float]:
    """The loss of each iteration of a run on the GPUs from ``place`` on; its log is left in the work folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.tp)]
    command += ["-m", "megatron_tiling", str(args.script), *MODEL, "--tensor-model-parallel-size", str(run.tp)]
    command += ["--train-iters", str(args.iterations), "--data-path", args.data, "--ckpt-format", "torch_dist"]
    command += ["--tokenizer-model", args.tokenizer_model, "--data-cache-path", str(args.work / "cache"), *args.flags]
    command += ["--use-tiled-linear", "--tile-factor", "4"] if run.tiled else [PLAIN]
    if run.source:
        source = re.sub(r"\W+", "-", run.source)
        command += ["--load", str(args.work / source), "--ckpt-step", str(run.start), "--exit-on-missing-checkpoint"]
    if run.save_at:
        command += ["--save", str(args.work / run.folder), "--save-interval", str(run.save_at)]
    if run.end < args.iterations:
        command += ["--exit-interval", str(run.end)]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(place + rank) for rank in range(run.tp))
    log = args.work / f"{run.folder}.log"
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    text = log.read_text()
    found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", text)
    losses = {int(iteration): float(loss) for iteration, loss in found}
    if status or list(losses) != list(range(run.start + 1, run.end + 1)):
        raise SystemExit(f"{run.name} failed (exit {status}, losses of {list(losses)}): {log}\n{text[-3000:]}")
    if ("megatron_tiling: tiled linear layers" in text) != run.tiled:
        raise SystemExit(f"{run.name}: the startup table says otherwise: {log}")
    losses.pop(run.start + 2, None)  # the trainer logs a mean of two iterations there
    return losses


def train_all(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """All curves; the one that was handed back begins with its tiled half."""
    first = args.iterations // 3
    half = (first + args.iterations) // 2
    curves: dict[str, dict[int, float]] = {}
    for stage in stages(first, half, args.iterations):
        side_by_side = len(stage) if torch.cuda.device_count() >= len(stage) else 1
        with ThreadPoolExecutor(side_by_side) as pool:
            futures = {run.name: pool.submit(train, run, place, args) for place, run in enumerate(stage)}
            curves |= {name: future.result() for name, future in futures.items()}
        for run in stage:
            print(f"{run.name}: iterations {run.start + 1} to {run.end}", flush=True)
    return curves


def differences(curves: dict[str, dict[int, float]], name: str) -> list[float]:
    reference = curves[REFERENCE]
    return [abs(loss - reference[i]) for i, loss in curves[name].items() if i in reference]


def report(curves: dict[str, dict[int, float]], origin: Origin, args: argparse.Namespace) -> str:
    lines = [
        *origin.head("Fine-tuning parity", "bf16"),
        "Dense at TP=1 saves; each row continues its checkpoint (weights and optimizer). The last row's dense half "
        "continues the checkpoint that the tiled run saved. Difference of the loss from dense at TP=1:",
        "",
        "| run | iterations compared | largest | mean | last loss |",
        "|---|---|---|---|---|",
    ]
    for name in (YARDSTICK, TILED, HANDED_BACK):
        gaps = differences(curves, name)
        last = curves[name][args.iterations]
        lines.append(f"| {name} | {len(gaps)} | {max(gaps):.4f} | {sum(gaps) / len(gaps):.4f} | {last:.4f} |")
    base, reference = list(curves[BASE].values()), list(curves[REFERENCE].values())
    steps = [abs(a - b) for a, b in pairwise(reference)]
    lines += [
        "",
        f"Dense at TP=1 went from {base[0]:.4f} to {base[-1]:.4f}, and after the checkpoint from {reference[0]:.4f} to "
        f"{reference[-1]:.4f}; from one iteration to the next its loss moves by {sum(steps) / len(steps):.4f}.",
    ]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib here: no picture")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "--" if "tiled" in name else "-", label=name, linewidth=1)
    axes.set(xlabel="iteration", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    example = Path(__file__).parents[1] / "examples" / "gpt" / "pretrain_gpt.py"
    parser.add_argument("--script", type=Path, default=example, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx, from examples/gpt/prepare_data.py")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--iterations", type=int, default=150, help="of which a third comes before the hand-over")
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetune_parity"), help="an empty folder, for logs")
    parser.add_argument("--output", type=output_folder, default=RESULTS)
    parser.add_argument("flags", nargs="*", help="Megatron flags for every run, after --")
    args = parser.parse_args()
    if args.iterations < 9:
        parser.error(f"--iterations {args.iterations}: must be at least 9, for three parts with losses to compare")
    args.work.mkdir(parents=True, exist_ok=True)
    if any(args.work.iterdir()):
        parser.error(f"--work {args.work}: is not empty")
    curves = train_all(args)
    origin = Origin.now(("torch", "megatron-core"), machine(several=True))
    text = report(curves, origin, args)
    name = f"{origin.date}-finetune-parity"
    (args.output / f"{name}.md").write_text(text)
    plot(curves, args.output / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()

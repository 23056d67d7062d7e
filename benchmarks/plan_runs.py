"""Training runs on the stock trainer, their peaks measured on GPUs, beside what the planner says of their commands.

    python -m benchmarks.plan_runs --measure --script PRETRAIN_GPT [--gpus 4] [--only NAME ...]
    python -m benchmarks.plan_runs --record RECORD.json --script PRETRAIN_GPT

The first writes a record and needs GPUs, the second plans each run of a record and writes a page; it needs none. Runs
of one GPU are two on each at a time, which a process's own peak does not feel.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.arguments import output_folder, positive
from benchmarks.record import RESULTS, Origin, machine
from megatron_tiling.plan.measure import Failed, records
from megatron_tiling.plan.room import RESERVED

MIB = 2**20
LLAMA = """
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --vocab-size 128255
"""
GPT2 = """
    --hidden-size 3072 --num-attention-heads 24 --position-embedding-type learned_absolute --vocab-size 50303
    --attention-dropout 0.1 --hidden-dropout 0.1
"""
TRAINING = """
    --bf16 --lr 1e-4 --seed 1234 --mock-data --tokenizer-type NullTokenizer --train-iters 3 --log-interval 1
    --eval-interval 1000000 --eval-iters 0 --micro-batch-size 1 --distributed-timeout-minutes 5
"""
TE = "--transformer-impl transformer_engine"
LOCAL = "--transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MLP = "--recompute-granularity selective --recompute-modules mlp"
TILED, KEEP_0 = "--use-tiled-linear", "--use-tiled-linear --tiled-mlp-keep 0"
TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
SP, ZERO1 = "--sequence-parallel", "--use-distributed-optimizer"
PP2 = "--pipeline-model-parallel-size 2"
VPP = "--num-virtual-stages-per-pipeline-rank 2"
OVERLAP = f"{ZERO1} --overlap-grad-reduce --overlap-param-gather"
MOE = """
    --num-experts 8 --moe-ffn-hidden-size 4096 --moe-router-topk 2 --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall --moe-router-force-load-balancing --expert-model-parallel-size 2
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run.

    Args:
        sequence: tokens of one, which is a micro-batch.
        batch: micro-batches of each data-parallel rank in a step.
    """

    name: str
    gpus: int
    layers: int
    sequence: int
    flags: str
    model: str = LLAMA
    batch: int = 2

    def arguments(self) -> list[str]:
        flags = [*self.model.split(), *TRAINING.split(), *self.flags.split()]
        shards = 1
        for size in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
            shards *= int(flags[flags.index(size) + 1]) if size in flags else 1
        lengths = ["--seq-length", str(self.sequence), "--max-position-embeddings", str(self.sequence)]
        batch = ["--global-batch-size", str(self.batch * self.gpus // shards)]
        return ["--num-layers", str(self.layers), *lengths, *batch, *flags]


FLASH, UNFUSED = f"{TE} --attention-backend flash", f"{TE} --attention-backend unfused"
CASES = (
    Case("dense", 1, 3, 4096, FLASH),
    Case("tiled", 1, 3, 4096, f"{FLASH} {TILED}"),
    Case("tiled, keep 0", 1, 3, 4096, f"{FLASH} {KEEP_0}"),
    Case("output alone tiled", 1, 3, 4096, f"{FLASH} {TILED} --tiled-linear-modules output"),
    Case("dense, recompute mlp", 1, 3, 4096, f"{FLASH} {MLP}"),
    Case("dense, full recompute, 16384 tokens", 1, 3, 16384, f"{FLASH} {FULL}"),
    Case("tiled, full recompute, 16384 tokens", 1, 3, 16384, f"{FLASH} {FULL} {TILED}"),
    Case("tiled, keep 0, 16384 tokens", 1, 2, 16384, f"{FLASH} {KEEP_0}"),
    Case("dense, unfused attention", 1, 2, 2048, UNFUSED),
    Case("tiled, unfused attention", 1, 2, 2048, f"{UNFUSED} {TILED}"),
    Case("dense, unfused attention, dropout, biases", 1, 2, 1024, UNFUSED, GPT2),
    Case("tiled, unfused attention, dropout, biases", 1, 2, 1024, f"{UNFUSED} {TILED}", GPT2),
    Case("dense, TP=2, sequence parallel", 2, 4, 8192, f"{FLASH} {TP2} {SP}"),
    Case("tiled, TP=2, sequence parallel", 2, 4, 8192, f"{FLASH} {TP2} {SP} {TILED}"),
    Case("tiled, keep 0, TP=2", 2, 4, 8192, f"{FLASH} {TP2} {KEEP_0}"),
    Case("dense, PP=2", 2, 6, 4096, f"{FLASH} {PP2}", batch=4),
    Case("tiled, PP=2", 2, 6, 4096, f"{FLASH} {PP2} {TILED}", batch=4),
    Case("dense, DP=2, distributed optimizer", 2, 3, 4096, f"{FLASH} {ZERO1}"),
    Case("tiled, DP=2, distributed optimizer, overlapped", 2, 3, 4096, f"{FLASH} {OVERLAP} {TILED}"),
    Case("tiled, DP=2, distributed optimizer, 512 tokens", 2, 3, 512, f"{FLASH} {ZERO1} {TILED}"),
    Case("dense, experts, EP=2", 2, 2, 4096, f"{FLASH} {MOE}"),
    Case("tiled, experts, EP=2", 2, 2, 4096, f"{FLASH} {MOE} {KEEP_0}"),
    Case("dense, FP8 tensorwise", 1, 3, 4096, f"{FLASH} --fp8-format hybrid --fp8-recipe tensorwise"),
    Case("tiled, FP8 tensorwise", 1, 3, 4096, f"{FLASH} --fp8-format hybrid --fp8-recipe tensorwise {TILED}"),
    Case("dense, experts fused and shared, EP=2", 2, 2, 4096,
         f"{FLASH} {MOE} --moe-permute-fusion --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 4096"),
    Case("dense, FP8 blockwise, TP=2, sequence parallel", 2, 4, 8192,
         f"{FLASH} --fp8-format hybrid --fp8-recipe blockwise {TP2} {SP}"),
    Case("tiled, next-token heads", 1, 2, 4096, f"{FLASH} {TILED} --mtp-num-layers 1"),
    Case("dense, DP=2, states in bf16", 2, 3, 4096,
         f"{FLASH} {ZERO1} --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
    Case("dense, TP=4, sequence parallel", 4, 4, 16384, f"{FLASH} {TP4} {SP}"),
    Case("tiled, keep 0, TP=4, sequence parallel", 4, 4, 16384, f"{FLASH} {TP4} {SP} {KEEP_0}"),
    Case("tiled, TP=2, PP=2, interleaved, distributed optimizer", 4, 8, 4096,
         f"{FLASH} {TP2} {SP} {PP2} {VPP} {ZERO1} {TILED}", batch=4),
    Case("dense, local", 1, 3, 2048, f"{LOCAL} --no-gradient-accumulation-fusion"),
    Case("tiled, local", 1, 3, 2048, f"{LOCAL} {TILED}"),
    Case("tiled, keep 0, local, full recompute", 1, 3, 4096, f"{LOCAL} {FULL} {KEEP_0}"),
    Case("dense, local, TP=2, sequence parallel", 2, 4, 2048, f"{LOCAL} --no-gradient-accumulation-fusion {TP2} {SP}"),
    Case("tiled, local, TP=2, sequence parallel", 2, 4, 2048, f"{LOCAL} {TP2} {SP} {TILED}"),
)  # fmt: skip


def measured(case: Case, gpus: list[str], script: Path) -> dict[str, Any]:
    """What each rank recorded, or the end of what was printed."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    found = records(str(script), case.arguments(), case.gpus, environment)
    if not isinstance(found, Failed):
        return dataclasses.asdict(case) | {"ranks": found}
    phase = f"out of memory in {found.phase}\n" if found.phase else ""
    return dataclasses.asdict(case) | {"error": phase + found.tail}


def measure(args: argparse.Namespace) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
    chosen = [case for case in CASES if case.gpus <= args.gpus and (not args.only or case.name in args.only)]
    packages = ("torch", "megatron-core", "transformer-engine", "flash-attn-4")
    origin = Origin.now(packages, machine(several=True))
    record: dict[str, Any] = {"origin": dataclasses.asdict(origin), "runs": []}
    path = args.results / f"{origin.date}-{args.name}.json"
    for size in sorted({case.gpus for case in chosen}):
        groups: SimpleQueue[list[str]] = SimpleQueue()
        lanes = [visible[i : i + size] for i in range(0, args.gpus - size + 1, size)] * 2
        for group in lanes:
            groups.put(group)

        def one(case: Case, groups: SimpleQueue[list[str]] = groups) -> dict[str, Any]:
            group = groups.get()
            try:
                return measured(case, group, args.script)
            finally:
                groups.put(group)

        with ThreadPoolExecutor(len(lanes)) as pool:
            for run in pool.map(one, [case for case in chosen if case.gpus == size]):
                record["runs"].append(run)
                path.write_text(json.dumps(record, indent=1) + "\n")  # what is measured stays, whatever comes
                print(run["name"], run.get("error", run.get("ranks")), flush=True)


def planned(case: Case, script: Path) -> tuple[int, str]:
    """Bytes of the peak and its phase, by the planner. Once a process."""
    from megatron_tiling.plan.command import Command, Plan, Setting
    from megatron_tiling.plan.run import prepare

    command = Command(str(script), case.arguments(), case.gpus)
    (plan,) = command.plan([Setting("", case.arguments())], prepare(command.with_transformer_engine))
    if not isinstance(plan, Plan):
        raise SystemExit(plan.splitlines()[-1])
    return plan.run.peak, plan.run.phase


def page(record: dict[str, Any], plans: list[tuple[int, str] | str]) -> str:
    origin = Origin(**record["origin"])
    rows, errors, reserved, phases = [], [], [], []
    for run, plan in zip(record["runs"], plans, strict=True):
        name = f"{run['name']} | {run['gpus']}"
        if "ranks" not in run:
            rows.append(f"| {name} | {' '.join(run['error'].split()[-12:])} | | | | |")
            continue
        fullest = max(run["ranks"], key=lambda rank: rank["peak"])
        cells = [f"{fullest['peak'] / MIB:.0f}", fullest["phase"], f"{fullest['reserved'] / MIB:.0f}"]
        if isinstance(plan, str):
            rows.append(f"| {name} | {' | '.join(cells)} | {plan.splitlines()[-1]} | | |")
            continue
        error = plan[0] / fullest["peak"] - 1
        errors.append(abs(error))
        reserved.append(abs(RESERVED * plan[0] / fullest["reserved"] - 1))
        phases.append(plan[1] == fullest["phase"])
        rows.append(f"| {name} | {' | '.join(cells)} | {plan[0] / MIB:.0f} | {plan[1]} | {error:+.2%} |")
    summary = f"{len(errors)} runs that are planned"
    if errors:
        summary += f": error {statistics.median(errors):.2%} in the median, {max(errors):.2%} at most; "
        summary += f"the phase is right in {sum(phases)}; {RESERVED:g} times the planned peak is reserved, with an "
        summary += f"error of {statistics.median(reserved):.1%} in the median, {max(reserved):.1%} at most"
    return "\n".join([
        *origin.head("Planned and measured peaks of training runs"),
        "The last step of each run on the stock trainer, on its fullest rank: `torch.cuda.max_memory_allocated`, what",
        "ran when that was reached, and the most that was reserved. Flags of each run: `benchmarks/plan_runs.py`.", "",
        "| run | GPUs | measured MiB | set by | reserved MiB | planned MiB | set by | error |",
        "|---|---|---|---|---|---|---|---|", *rows, "", f"{summary}.",
    ]) + "\n"  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    from megatron_tiling.plan.processes import in_processes

    record = json.loads(args.record.read_text())
    names = [field.name for field in dataclasses.fields(Case)]
    cases = [Case(**{name: run[name] for name in names}) for run in record["runs"]]
    text = page(record, in_processes([functools.partial(planned, case, args.script) for case in cases]))
    args.record.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--measure", action="store_true", help="on this machine's GPUs")
    parser.add_argument("--gpus", type=positive, default=4)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--name", default="plan-runs")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--record", type=Path, help="what was measured")
    args = parser.parse_args()
    if args.measure == (args.record is not None):
        parser.error("give --measure or --record RECORD.json")
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    if args.measure and not 1 <= args.gpus <= torch.cuda.device_count():
        parser.error(f"--gpus {args.gpus}: this machine has {torch.cuda.device_count()}")
    measure(args) if args.measure else compare(args)


if __name__ == "__main__":
    main()

"""What the planner says of known models on up to 1,024 GPUs: peaks of the fullest rank, dense and tiled.

    python -m benchmarks.plan_scale --script PRETRAIN_GPT

No GPU is used, and nothing of this was measured. One micro-batch is one sequence; optimizer states are sharded over
data-parallel ranks, each of which takes 16 micro-batches.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import output_folder
from benchmarks.plan_runs import KEEP_0, TILED, TRAINING, ZERO1
from benchmarks.record import RESULTS, Origin
from megatron_tiling.plan.command import GIB, Command, Plan
from megatron_tiling.plan.options import OUTSIDE_GIB
from megatron_tiling.plan.processes import in_processes
from megatron_tiling.plan.room import room
from megatron_tiling.plan.run import prepare

LLAMA = """
    --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --vocab-size 128255 --attention-backend flash
"""
LLAMA_8B = "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32"
LLAMA_70B = "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64"
LLAMA_405B = """
    --num-layers 126 --hidden-size 16384 --ffn-hidden-size 53248 --num-attention-heads 128
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
"""
MIXTRAL_8X22B = """
    --num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 --num-experts 8
    --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall
"""
SETTINGS = ("", TILED, KEEP_0)


@dataclass(frozen=True)
class Case:
    """A model on GPUs: sizes of tensor, pipeline and expert parallelism, tokens of a sequence."""

    model: str
    shape: str
    gpus: int
    tensor: int
    pipeline: int
    tokens: int
    expert: int = 1

    def arguments(self) -> list[str]:
        flags = f"{self.shape} {LLAMA} {TRAINING} {ZERO1} --tensor-model-parallel-size {self.tensor}"
        flags += f" --pipeline-model-parallel-size {self.pipeline} --expert-model-parallel-size {self.expert}"
        flags += " --sequence-parallel" * (self.tensor > 1) + " --expert-tensor-parallel-size 1" * (self.expert > 1)
        flags += f" --seq-length {self.tokens} --max-position-embeddings {self.tokens}"
        return f"{flags} --global-batch-size {16 * self.gpus // self.tensor // self.pipeline}".split()


CASES = (
    Case("Llama 3 8B", LLAMA_8B, 8, 1, 1, 8192),
    Case("Llama 3 8B", LLAMA_8B, 64, 1, 1, 8192),
    Case("Llama 3 8B", LLAMA_8B, 1024, 1, 1, 16384),
    Case("Llama 3 8B", LLAMA_8B, 1024, 8, 1, 131072),
    Case("Llama 3 70B", LLAMA_70B, 64, 8, 4, 8192),
    Case("Llama 3 70B", LLAMA_70B, 256, 8, 2, 8192),
    Case("Llama 3 70B", LLAMA_70B, 1024, 8, 4, 32768),
    Case("Llama 3 405B", LLAMA_405B, 1024, 8, 16, 8192),
    Case("Mixtral 8x22B", MIXTRAL_8X22B, 256, 2, 4, 8192, expert=8),
    Case("Mixtral 8x22B", MIXTRAL_8X22B, 1024, 4, 4, 32768, expert=8),
)


def planned(case: Case, script: Path) -> list[str]:
    """Cells of a row: GiB and phase of each setting. Once a process."""
    command = Command(str(script), case.arguments(), case.gpus)
    tracker = prepare(command.with_transformer_engine)
    return [
        f"{plan.run.peak / GIB:.1f}, {plan.run.phase}" if isinstance(plan, Plan) else plan.splitlines()[-1]
        for plan in command.plan([command.with_flags(flags) for flags in SETTINGS], tracker)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="a Megatron-LM pretrain_gpt.py")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    rows = []
    for case in CASES:  # one after the other: the settings of each run side by side
        (cells,) = in_processes([functools.partial(planned, case, args.script)])
        found = [cells] if isinstance(cells, str) else cells
        layout = f"TP={case.tensor}, PP={case.pipeline}" + f", EP={case.expert}" * (case.expert > 1)
        rows.append(f"| {' | '.join([case.model, f'{case.gpus:,}', layout, f'{case.tokens:,}', *found])} |")
        print(rows[-1], flush=True)
    origin = Origin.now(("torch", "megatron-core"), "no GPU")
    left = room(80, OUTSIDE_GIB, {})
    (args.results / f"{origin.date}-planner-scale.md").write_text("\n".join([
        *origin.head("Planned peaks of known models, to 1,024 GPUs"),
        "GiB on the fullest rank, as `torch.cuda.max_memory_allocated` counts them, and what runs then. Predicted, not",
        "measured. One sequence is a micro-batch; the distributed optimizer; TransformerEngine with flash attention;",
        f"experts get a balanced router's rows. A GPU of 80 GiB has some {left.peak:.0f} for these, and {left.torch:g}",
        "with expandable segments. Flags: `benchmarks/plan_scale.py`.", "",
        "| model | GPUs | layout | tokens | dense | tiled | tiled, keep 0 |", "|---|---|---|---|---|---|---|", *rows,
    ]) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

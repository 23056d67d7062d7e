"""Forward and backward of a GPT on TransformerEngine, dense as a stock user runs it, and tiled: time, memory, kernels.

    python -m benchmarks.whole_model [--layers 3] [--hidden-size 4096] [--ffn-hidden-size 14336] [--query-groups 8]
        [--vocabulary 128256] [--sequence 2048] [--batch 4] [--repeats 20] [--attention auto] [--results DIR]
        [--fp8 RECIPE] [--micro-batches 1]
    torchrun --standalone --nproc-per-node 4 -m benchmarks.whole_model --tensor-parallel 4 --layers 4 ...

All candidates share one set of parameters and of gradients, which Megatron's DDP holds in float32 (``main_grad``) all
the time; dense fuses the accumulation of weight gradients (apex's kernel for the output layer, which must be built;
TransformerEngine's own for the others) and the loss (``cross_entropy_loss_fusion``). Memory is the peak less what is
held between steps: weights, main_grad, inputs. Runs are interleaved in random order. A run begins with an idle GPU that
waits for the host; of ``--micro-batches`` in a row, as gradients are accumulated, only the first one does.

With ``--fp8`` the same in FP8, beside bf16. A step is a micro-batch: the first one of an optimizer step quantizes the
weights, a later one takes what the first has kept. Memory is the peak of both, with those copies.

Under torchrun layers are divided among the ranks (``--tensor-parallel``), with sequence parallelism: dense, tiled, in
four tiles, and with communication behind products. All ranks begin a run together; times are those of the slowest one,
memory is that of the fullest and has symmetric memory too, kernels are the first rank's.
"""

import argparse
import collections
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpt, ranks
from benchmarks.arguments import at_least, output_folder, positive
from benchmarks.record import RESULTS, Origin, machine
from megatron_tiling.config import MODULES
from megatron_tiling.tiles.symmetric import symmetric_bytes

MIB = 2**20
DENSE, TILED = "dense", "tiled: default"
OVERLAP_STEPS = 2, 3, 4
FP8_DENSE, FP8_TILED = "FP8 dense", "FP8 tiled: default"
#: Kinds of kernels, by what their names hold; the first that matches.
KINDS = (
    (
        "attention",
        ("fmha", "flash", "softmax_fwd", "softmax_bwd", "scaled_", "_softmax", "cudnn_generated_fort_native_sdpa"),
    ),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "splitKreduce")),
    ("norm", ("norm", "rms")),
    ("tiled activation", ("_forward_kernel", "_backward_kernel")),
    ("tiled loss", ("_update_statistics", "_logits_to_gradient")),
    ("activation", ("swiglu", "silu", "gelu", "glu")),
    ("rope", ("rope", "rotary")),
    ("casts to FP8", ("cast_transpose", "amax", "transpose_optimized", "unary_kernel")),
    ("communication", ("nccl", "barrier")),
)
#: Name, changes of Megatron's config, and settings of the tiling, if any.
Setting = tuple[str, dict[str, Any], dict[str, Any] | None]


@dataclass
class Candidate:
    """A model that runs on the shared parameters."""

    name: str
    model: Any
    step: Callable[[], Tensor]
    milliseconds: list[float] = field(default_factory=list)
    first_milliseconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    copies_mib: float = 0.0
    loss: float = 0.0
    host_milliseconds: list[float] = field(default_factory=list)
    busy_milliseconds: float = 0.0
    span_milliseconds: float = 0.0
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)
    longest: list[tuple[str, int, float]] = field(default_factory=list)

    def forget_copies(self) -> None:
        """Of weights, in FP8."""
        for module in self.model.modules():
            for name in ("_fp8_workspaces", "_copies"):
                getattr(module, name, {}).clear()


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    mlp = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if args.tensor_parallel > 1:
        parallel = {"tensor_model_parallel_size": args.tensor_parallel, "sequence_parallel": True}
        yield DENSE, parallel, None
        yield TILED, parallel, {}
        yield "tiled: factor 4", parallel, {"factor": 4}
        yield "tiled: overlap auto", parallel, {"tp_overlap": "auto"}
        for steps in OVERLAP_STEPS:
            yield f"tiled: overlap {steps} steps", parallel, {"tp_overlap": steps}
        return
    yield DENSE, {}, None
    if args.fp8:
        yield TILED, {}, {}
        fp8 = {"fp8": "hybrid", "fp8_recipe": args.fp8}
        yield FP8_DENSE, fp8, None
        yield FP8_TILED, fp8, {}
        yield "FP8 tiled: copies held", fp8, {"fp8_hold_weights": True}
        yield "FP8 tiled: keep 0", fp8, {"mlp_keep": 0}
        return
    yield "dense, recompute mlp", mlp, None
    yield TILED, {}, {}
    yield "tiled: keep 0", {}, {"mlp_keep": 0}
    yield "tiled: factor 2, keep 0", {}, {"factor": 2, "mlp_keep": 0}
    yield "tiled: output alone", {}, {"modules": ("output",)}
    if args.more:
        yield "tiled: all modules", {}, {"modules": MODULES}
        yield "tiled: no head tiles kept", {}, {"head_keep": 0}
        yield "tiled: head within 272 MiB", {}, {"head_memory_mib": 272}
        yield "tiled: fc1 fc2 alone", {}, {"modules": ("fc1", "fc2")}
        yield "tiled: factor 2", {}, {"factor": 2}
        yield "tiled: factor 4", {}, {"factor": 4}
        yield "tiled: factor 8, keep 0", {}, {"factor": 8, "mlp_keep": 0}


def candidates(
    args: argparse.Namespace, chosen: Iterable[Setting], build: Any = gpt.build
) -> tuple[list[Candidate], Any]:
    """All of them, and the DDP wrapper that holds main_grad.

    Args:
        chosen: as from ``settings``.
        build: ``(args, changes)`` -> a model.
    """
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import table

    inputs = gpt.batch(args, args.sequence, args.batch)
    found: list[Candidate] = []
    ddp: Any = None
    for name, changes, tiling in chosen:
        model = build(args, changes)
        if ddp is None:
            ddp = gpt.with_main_grad(model)
            parameters = dict(model.named_parameters())
        else:
            gpt.share(model, parameters)
        if tiling is not None:
            ranks.say(f"{name}:\n{table(tile(model, TilingConfig(**tiling)))}")

        def step(model: Any = model) -> Tensor:
            loss: Tensor = model(**inputs).mean()
            loss.backward()
            return loss.detach()

        found.append(Candidate(name, model, step))
    torch.cuda.empty_cache()
    return found, ddp


def measure(found: list[Candidate], ddp: Any, repeats: int, firsts: bool, micro_batches: int = 1) -> None:
    """Symmetric memory counts as far as it has grown: candidates that need none, or less, come first."""
    for candidate in found:
        for _ in range(3):
            run(candidate, ddp)
        candidate.forget_copies()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        candidate.loss = float(run(candidate, ddp, is_first=True)[0])
        candidate.copies_mib = (torch.cuda.memory_allocated() - held) / MIB
        run(candidate, ddp)
        peak = torch.cuda.max_memory_allocated() - held + symmetric_bytes()
        candidate.peak_mib = ranks.largest(peak / MIB)[0]
        candidate.forget_copies()
    order, chance = list(found), random.Random(ranks.of_first(random.getrandbits(32)))
    for _ in range(repeats):
        chance.shuffle(order)
        for candidate in order:
            if firsts:
                candidate.first_milliseconds.append(run(candidate, ddp, True, micro_batches)[1])
            _, milliseconds, host = run(candidate, ddp, False, micro_batches)
            candidate.milliseconds.append(milliseconds)
            candidate.host_milliseconds.append(host)
    for candidate in found:
        candidate.milliseconds = ranks.largest(*candidate.milliseconds)
        candidate.host_milliseconds = ranks.largest(*candidate.host_milliseconds)
        profile(candidate, ddp)


def run(candidate: Candidate, ddp: Any, is_first: bool = False, micro_batches: int = 1) -> tuple[Tensor, float, float]:
    """Loss, milliseconds of a micro-batch, and the host's until it has launched it. main_grad is zeroed before."""
    ddp.zero_grad_buffer()
    if is_first:
        candidate.model.set_is_first_microbatch()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ranks.largest(0)  # all begin together
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    for _ in range(micro_batches):
        loss = candidate.step()
    stop.record()
    host = 1000 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return loss, start.elapsed_time(stop) / micro_batches, host / micro_batches


def profile(candidate: Candidate, ddp: Any) -> None:
    """Launches and milliseconds of one step by kind of kernel, its longest kernels, and how long the GPU was busy."""
    ddp.zero_grad_buffer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        candidate.step()
        torch.cuda.synchronize()
    sums: collections.defaultdict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    rows = [(event.key, event.count, event.device_time_total / 1000) for event in profiler.key_averages()]
    for name, count, milliseconds in rows:
        if milliseconds:
            kind = next((kind for kind, parts in KINDS if any(part.lower() in name.lower() for part in parts)), "other")
            sums[kind][0] += count
            sums[kind][1] += milliseconds
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    candidate.busy_milliseconds, candidate.span_milliseconds = busy / 1000, (end - spans[0][0]) / 1000
    candidate.kernels = {kind: (int(count), round(ms, 3)) for kind, (count, ms) in sums.items()}
    candidate.longest = sorted((row for row in rows if row[2]), key=lambda row: -row[2])[:60]


def markdown(record: dict[str, Any]) -> str:
    rows = record["candidates"]
    dense, recipe, parallel = rows[0], record["fp8"], record.get("tensor_parallel", 1)
    title = record["title"] + f", FP8 {recipe}" * bool(recipe)
    setting = f"TP={parallel} with sequence parallelism, " * (parallel > 1) + f"attention: {record['attention']}"
    slowest = (
        " Times are the slowest rank's, memory is the fullest's, with symmetric memory, kernels are the first one's."
    ) * (parallel > 1)
    columns = ["", "ms", "time", *["ms of the first", "time of FP8 dense"] * bool(recipe), "ms of the host"]
    columns += ["ms busy, profiled", "peak, MiB", "memory", *["copies of weights, MiB"] * bool(recipe), "loss"]
    lines = [
        *Origin(**record["origin"]).head(title, setting),
        f"bf16{' and FP8' * bool(recipe)}, random tokens; weights and main_grad held all the time and not counted; "
        f"medians of {record['repeats']} interleaved runs in random order. Times are those of a micro-batch, "
        f"of {record['micro_batches']} in a row, which begin with an idle GPU.{slowest}", "",
        f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
    ]  # fmt: skip
    for row in rows:
        low, _, high = statistics.quantiles(row["milliseconds"])
        cells = [
            row["name"],
            f"{row['median']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['median'] / dense['median']:.3f}",
        ]
        if recipe:
            cells.append(f"{statistics.median(row['first_milliseconds']):.2f}")
            cells.append(f"{row['median'] / named(rows, FP8_DENSE)['median']:.3f}")
        cells.append(f"{statistics.median(row['host_milliseconds']):.0f}")
        cells.append(f"{row['busy_milliseconds']:.1f} of {row['span_milliseconds']:.1f}")
        cells += [f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / dense['peak_mib']:.3f}"]
        cells += [*[f"{row['copies_mib']:.0f}"] * bool(recipe), f"{row['loss']:.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if recipe:
        lines += ["", *targets(rows)]
    kinds = sorted({kind for row in rows for kind in row["kernels"]})
    lines += ["", "Kernels of one step, launches and ms:", "", "| | " + " | ".join(row["name"] for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for kind in kinds:
        cells = [row["kernels"].get(kind, (0, 0.0)) for row in rows]
        lines.append(f"| `{kind}` | " + " | ".join(f"{count}, {ms:.2f}" if count else "" for count, ms in cells) + " |")
    return "\n".join(lines) + "\n"


def named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """Of tiled FP8, what was asked for and what came out."""
    bf16, tiled, fp8_dense = (named(rows, name) for name in (DENSE, TILED, FP8_DENSE))
    limit = tiled["peak_mib"] + fp8_dense["copies_mib"]
    lines = [
        "Targets of tiled FP8: at most 1.02 of dense FP8's time; at least 0.8 of what dense gains in time over bf16;"
    ]
    lines += [f"at most {limit:.0f} MiB, which are those of tiled bf16 and the copies of weights of dense FP8.", ""]
    lines += ["| | time of dense FP8 | of dense's gain | MiB of the limit |", "|---|---|---|---|"]
    for row in rows:
        if row["name"].startswith("FP8 tiled"):
            gain = (tiled["median"] - row["median"]) / (bf16["median"] - fp8_dense["median"])
            time, memory = row["median"] / fp8_dense["median"], row["peak_mib"] / limit
            lines.append(f"| {row['name']} | {time:.3f} | {gain:.2f} | {memory:.2f} |")
    return lines


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 3, "hidden_size": 4096, "ffn_hidden_size": 14336, "query_groups": 8, "vocabulary": 128256}
    gpt.add_shape(parser, **shape, sequence=2048, batch=4)
    parser.add_argument("--repeats", type=at_least(2), default=20)
    parser.add_argument("--micro-batches", type=positive, default=1, help="in a row, before the host waits for the GPU")
    parser.add_argument("--more", action="store_true", help="more settings of the tiling")
    parser.add_argument("--tensor-parallel", type=positive, default=1, help="GPUs, each with its part of all layers")
    parser.add_argument("--fp8", metavar="RECIPE", help="FP8 beside bf16, in place of other settings")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--name", default="whole-model")
    args = parser.parse_args(given)
    size = args.tensor_parallel
    ranks.check_count(parser, "--tensor-parallel", size)
    for flag, value in (("--fp8", args.fp8), ("--more", args.more), ("--experts", args.experts)):
        if size > 1 and value:
            parser.error(f"{flag}: not with --tensor-parallel {size}")
    return args


def main() -> None:
    args = arguments()
    with ranks.ending_together():
        gpt.initialize(tensor_parallel=args.tensor_parallel)
        found, ddp = candidates(args, settings(args))
        measure(found, ddp, args.repeats, bool(args.fp8), args.micro_batches)
        if ranks.is_first():
            save(found, args, "A GPT on TransformerEngine, forward and backward")
        torch.distributed.destroy_process_group()


def save(found: list[Candidate], args: argparse.Namespace, title: str) -> None:
    """Write what was measured as JSON and as a page."""
    origin = Origin.now(gpt.PACKAGES, machine(several=ranks.count() > 1))
    origin = replace(origin, versions=origin.versions | {"cuDNN": str(torch.backends.cudnn.version())})
    record = {
        "title": title,
        "origin": asdict(origin),
        "attention": args.attention,
        "fp8": getattr(args, "fp8", None),
        "tensor_parallel": getattr(args, "tensor_parallel", 1),
        "repeats": args.repeats,
        "micro_batches": getattr(args, "micro_batches", 1),
        "candidates": [
            {key: value for key, value in vars(candidate).items() if key not in ("step", "model")}
            | {"median": statistics.median(candidate.milliseconds)}
            for candidate in found
        ],
    }
    path = args.results / f"{origin.date}-{args.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    print(markdown(record), flush=True)


if __name__ == "__main__":
    main()

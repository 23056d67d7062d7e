"""An MLP of TransformerEngine's layers under tensor and sequence parallelism: communication beside products.

    torchrun --standalone --nproc-per-node TP -m benchmarks.tp_overlap [--sizes 8192x28672 4096x14336]
        [--tokens 8192 16384] [--steps 2 3 4 6] [--userbuffers]
    python -m benchmarks.tp_overlap_report RECORD.json     # the page and the picture again

fc1 with its norm, and fc2: TransformerEngine's dense, ours without overlap, ours with it by symmetric memory and by
NCCL; dense and ours also with communication left out, which says what it costs. Float32 gradients (``main_grad``) are
held all the time. Candidates run interleaved, in one random order on all ranks. ``--userbuffers`` adds
TransformerEngine's own overlap (without multicast). Writes a record, its page and its picture into benchmarks/results/.
"""

import argparse
import contextlib
import json
import os
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron asks for with tensor parallelism

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import mlp_measure as measure
from benchmarks import tp_overlap_report as report
from benchmarks.mlp_candidates import Candidate
from benchmarks.record import RESULTS, Origin, machine
from benchmarks.te_mlp import add_to_main_grad

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core")
HUNG = timedelta(seconds=120)


@dataclass
class Row:
    """A candidate of this benchmark; ``around`` is entered while it runs, forward and backward."""

    name: str
    run: Callable[[Tensor], Tensor]
    around: Callable[[], Any] = contextlib.nullcontext
    held: int = 0
    milliseconds: list[float] = field(default_factory=list)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.name, self.run, [])


def initialize() -> None:
    from megatron.core import parallel_state

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=HUNG)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch._dynamo.config.automatic_dynamic_shapes = False  # each size has kernels of its own


def build(shape: tuple[int, int], **changes: Any) -> Any:
    """Megatron's MLP on TransformerEngine's layers, the norm in fc1; this rank's shard."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = TransformerConfig(
        num_layers=1, hidden_size=shape[0], ffn_hidden_size=shape[1], num_attention_heads=shape[0] // 128,
        normalization="RMSNorm", params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=True, gradient_accumulation_fusion=True,
        tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=True, **changes,
    )  # fmt: skip
    submodules = MLPSubmodules(linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
    return torch.nn.ModuleDict({"mlp": MLP(config, submodules, ffn_hidden_size=shape[1])}).cuda()


class Still:
    """Stands for what arrives where nothing is sent: random numbers, for products of zeros are faster."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, ...], Tensor] = {}

    def of(self, *shape: int) -> Tensor:
        if shape not in self.memory:
            self.memory[shape] = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return self.memory[shape].detach()  # a tensor of its own: TransformerEngine empties what it has used

    @contextlib.contextmanager
    def in_dense(self) -> Iterator[None]:
        """TransformerEngine's layers send nothing."""
        from transformer_engine.pytorch.module import base, layernorm_linear, linear

        def gathered(shard: Tensor, group: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
            return self.of(shard.shape[0] * group.size(), *shard.shape[1:]), None

        def scattered(whole: Tensor, group: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
            return whole[: whole.shape[0] // group.size()], None

        names = {"gather_along_first_dim": gathered, "reduce_scatter_along_first_dim": scattered}
        with replaced((base, layernorm_linear, linear), names):
            yield

    @contextlib.contextmanager
    def in_steps(self) -> Iterator[None]:
        """Our stepped loop sends nothing, and adds up what its memory holds."""
        from megatron_tiling.tiles import step_comm, stepped_mlp

        class StillSteps(step_comm.ScatteredSteps):
            def _exchange(self, sends: Any, receives: Any) -> list[Any]:
                return []

        def start(group: Any, sequence_parallel: bool, sources: Any, out: Any, transport: str) -> Any:
            return StillSteps(group, sources, out)

        with replaced((stepped_mlp,), {"start_steps": start}):
            yield


@contextlib.contextmanager
def replaced(modules: tuple[Any, ...], functions: dict[str, Any]) -> Iterator[None]:
    stock = [(module, name, getattr(module, name)) for module in modules for name in functions if hasattr(module, name)]
    for module, name, _ in stock:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for module, name, function in stock:
            setattr(module, name, function)


def rows_of(dense: Any, shape: tuple[int, int], tokens: int, steps: list[int], userbuffers: bool) -> Iterator[Row]:
    """All on the weights of ``dense``. Held besides the peak: symmetric memory, and Megatron's buffer for gathers."""
    from benchmarks.gpt import share
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.tiles import symmetric

    still, ranks = Still(), dist.get_world_size()
    yield Row(report.DENSE, lambda hidden: dense.mlp(hidden)[0])
    yield Row(report.DENSE_STILL, lambda hidden: dense.mlp(hidden)[0], still.in_dense)
    if userbuffers:
        model = with_userbuffers(shape, tokens)
        share(model, dict(dense.named_parameters()))
        yield Row("TransformerEngine, --tp-comm-overlap", lambda hidden, mlp=model.mlp: mlp(hidden)[0])

    def ours(factor: int, keep: Any, overlap: int | None = None, transport: str = "auto") -> Any:
        model = build(shape)
        share(model, dict(dense.named_parameters()))
        tile(model, TilingConfig(factor=factor, modules=("fc1", "fc2"), mlp_keep=keep, tp_overlap=overlap))
        model.mlp.transport = transport
        return lambda hidden, mlp=model.mlp: mlp(hidden)[0]

    whole = tokens * shape[0] * 2
    yield Row(report.OURS, ours(1, "all"), held=whole)
    yield Row("ours, 4 tiles", ours(4, "all"), held=whole)
    areas = symmetric.SOURCES * whole // ranks + whole
    for count in steps:
        yield Row(f"ours, {count} steps", ours(1, "all", count), held=whole + areas)
    four = 4 if 4 in steps else steps[-1]
    yield Row(f"ours, {four} steps, keep 0", ours(1, 0, four), held=areas)
    yield Row("ours, 4 tiles, keep 0", ours(4, 0), held=whole)
    for count in steps[1:3]:
        yield Row(f"ours, {count} steps, by NCCL", ours(1, "all", count, "collectives"), held=whole)
    for count in steps[1:3]:
        name = f"ours, {count} steps, without communication"
        yield Row(name, ours(1, "all", count, "collectives"), still.in_steps)


def with_userbuffers(shape: tuple[int, int], tokens: int) -> Any:
    from transformer_engine.pytorch.module import base

    os.environ.setdefault("UB_SKIPMC", "1")
    modes = [base.UserBufferQuantizationMode.NONE]
    world = dist.get_world_size()
    base.initialize_ub([tokens, shape[0]], world, quantization_modes=modes, bootstrap_backend="nccl")
    return build(shape, tp_comm_overlap=True)


def time_once(row: Row, hidden: Tensor, grad_output: Tensor) -> float:
    """As ``measure.time_once``, and all ranks begin together."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    together = torch.zeros(1, device="cuda")
    dist.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(measure.HEAD_START)
    dist.all_reduce(together)
    start.record()
    for _ in range(measure.STEPS):
        measure.step(row.candidate, hidden, grad_output)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / measure.STEPS


def largest_of_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, device="cuda", dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def run_size(shape: tuple[int, int], tokens: int, args: argparse.Namespace, traced: bool) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch._dynamo.reset()
    model_parallel_cuda_manual_seed(7)
    dense = build(shape)
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(add_to_main_grad)
    torch.manual_seed(1 + dist.get_rank())
    hidden = torch.randn(tokens // dist.get_world_size(), 1, shape[0], device="cuda", dtype=torch.bfloat16)
    grad_output = torch.randn_like(hidden)
    hidden.requires_grad_()
    rows, exact, found_rows = [], {}, []
    for row in rows_of(dense, shape, tokens, args.steps, args.userbuffers):
        for parameter in dense.parameters():
            parameter.main_grad.zero_()
            parameter.grad_added_to_main_grad = False
        try:
            with row.around():
                output = measure.step(row.candidate, hidden, grad_output)
                found = {"output": output.detach().clone(), "hidden": hidden.grad.clone()}
                found |= {key: parameter.main_grad.clone() for key, parameter in dense.named_parameters()}
                exact = exact or found
                differences = [float((found[key] - value).norm() / value.norm()) for key, value in exact.items()]
                del output, found
                for _ in range(3):
                    measure.step(row.candidate, hidden, grad_output)
                peak = measure.peak_memory(row.candidate, hidden, grad_output, held=True)
        except Exception:  # on all ranks; of what is on one alone the others hear when they have waited
            if row.name in (report.DENSE, report.DENSE_STILL):
                raise
            print(f"{row.name} left out: {traceback.format_exc()}", flush=True)
            continue
        differences = largest_of_ranks(differences)
        rows.append(row)
        shown = dict(zip(exact, differences, strict=True)) if row.around is contextlib.nullcontext else {}
        found_rows.append({"name": row.name, "peak_mib": peak, "held_mib": row.held / 2**20, "differences": shown})
        if dist.get_rank() == 0:
            print(f"{shape}, {tokens} tokens: {row.name} runs", flush=True)
    order = random.Random(1)
    for _ in range(args.repeats):
        for row in order.sample(rows, len(rows)):
            with row.around():
                row.milliseconds.append(time_once(row, hidden, grad_output))
    for row, found_row in zip(rows, found_rows, strict=True):
        found_row["milliseconds"] = largest_of_ranks(row.milliseconds)
    traces = {}
    if traced:
        for row in rows:
            if row.name in report.TRACED:
                traces[row.name] = trace(row, hidden, grad_output)
    return {"shape": shape, "tokens": tokens, "rows": found_rows, "traces": traces}


def trace(row: Row, hidden: Tensor, grad_output: Tensor) -> list[tuple[str, int, float, float]]:
    """``(kernel or copy, stream, start, duration)`` in microseconds, of one step on this rank."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            dist.barrier()
            torch.cuda.synchronize()
            with torch.profiler.record_function("one step"):
                torch.cuda._sleep(measure.HEAD_START)
                measure.step(row.candidate, hidden, grad_output)
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    on_gpu.sort(key=lambda event: event["ts"])
    begins = max(i for i, event in enumerate(on_gpu) if "spin" in event["name"] or "sleep" in event["name"].lower())
    last = on_gpu[begins + 1 :]
    return [(event["name"], event["args"]["stream"], event["ts"] - last[0]["ts"], event["dur"]) for event in last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8192x28672", "4096x14336"], help="hidden x ffn_hidden")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--userbuffers", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.userbuffers and len(args.sizes) * len(args.tokens) > 1:
        parser.error("--userbuffers takes one size and one number of tokens: its buffers are of one shape")
    initialize()
    origin = Origin.now(PACKAGES, machine(several=True))
    name = f"{origin.date}-tp-overlap-tp{dist.get_world_size()}" + "-userbuffers" * args.userbuffers
    record: dict[str, Any] = {"origin": asdict(origin), "tp": dist.get_world_size(), "repeats": args.repeats}
    record |= {"transport": "", "runs": []}
    for tokens in args.tokens:
        for size in args.sizes:
            hidden_size, ffn_hidden_size = map(int, size.split("x"))
            record["runs"].append(run_size((hidden_size, ffn_hidden_size), tokens, args, not record["runs"]))
            torch.cuda.empty_cache()
            if dist.get_rank() == 0:  # after each size: a run that is stopped leaves those that are done
                from megatron_tiling.tiles.symmetric import symmetric_bytes

                record["transport"] = "symmetric memory" if symmetric_bytes() else "collectives: no symmetric memory"
                args.results.mkdir(parents=True, exist_ok=True)
                path = args.results / f"{name}.json"
                path.write_text(json.dumps(record) + "\n")
                print(report.write(path), flush=True)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

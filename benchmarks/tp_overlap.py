"""TransformerEngine's layers under tensor and sequence parallelism: communication beside products.

    torchrun --standalone --nproc-per-node TP -m benchmarks.tp_overlap [--what mlp] [--sizes 8192x28672 4096x14336]
        [--tokens 8192 16384] [--steps 2 3 4 6] [--fused-ops] [--userbuffers] [--profile-host FILE]
    torchrun --standalone --nproc-per-node TP -m benchmarks.tp_overlap --what layer [--sequence 8192] ...
    python -m benchmarks.tp_overlap_report RECORD.json     # the page and the picture again

An MLP, fc1 with its norm and fc2, or a whole transformer layer: TransformerEngine's dense, ours without overlap, ours
with it by symmetric memory and by NCCL; dense and ours also with communication left out, which says what it costs.
Float32 gradients (``main_grad``) are held all the time. Candidates run interleaved, in one random order on all ranks.
``--userbuffers`` adds TransformerEngine's own overlap, ``--fused-ops`` torch's (of an MLP), both without multicast. A
peer that fails is left out, and the page says why. Writes a record, its page and its picture into benchmarks/results/.
"""

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import random
import tempfile
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron asks for with tensor parallelism
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import mlp_measure as measure
from benchmarks import tp_overlap_report as report
from benchmarks.arguments import at_least, output_folder, positive
from benchmarks.record import RESULTS, Origin, machine
from benchmarks.te_mlp import add_to_main_grad
from benchmarks.tp_overlap_rows import KINDS, QUERY_GROUPS, Row, rows_of

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "flash-attn-4")
PROFILED_STEPS = 20
HEAD_START = 40_000_000  # GPU cycles: the host launches all steps of a run in the meantime, and is told apart
HUNG = timedelta(seconds=120)


def initialize() -> None:
    from megatron.core import parallel_state

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=HUNG)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch._dynamo.config.automatic_dynamic_shapes = False  # each size has kernels of its own


def time_once(row: Row, hidden: Tensor, grad_output: Tensor) -> tuple[float, float]:
    """Milliseconds of a step, as ``measure.time_once``, all ranks beginning together; and of the host to launch it."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    together = torch.zeros(1, device="cuda")
    dist.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    dist.all_reduce(together)
    start.record()
    begin = time.perf_counter()
    for _ in range(measure.STEPS):
        measure.step(row.candidate, hidden, grad_output)
    host = 1000 * (time.perf_counter() - begin)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / measure.STEPS, host / measure.STEPS


def largest_of_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, device="cuda", dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def run_size(shape: tuple[int, int], tokens: int, args: argparse.Namespace, is_first: bool) -> dict[str, Any]:
    """All candidates of a size; of the first one a trace, and a profile of the host if it was asked for."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch._dynamo.reset()
    model_parallel_cuda_manual_seed(7)
    kind = KINDS[args.what](shape, tokens, args)
    dense = kind.build()
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(add_to_main_grad)
    torch.manual_seed(1 + dist.get_rank())
    rows_of_shard = tokens // kind.batch // dist.get_world_size()
    hidden = torch.randn(rows_of_shard, kind.batch, shape[0], device="cuda", dtype=torch.bfloat16)
    grad_output = torch.randn_like(hidden)
    hidden.requires_grad_()
    rows: list[Row] = []
    found_rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    exact: dict[str, Tensor] = {}
    for row in rows_of(kind, dense, args.steps, args):
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
        except Exception as error:  # on all ranks; of what is on one alone the others hear when they have waited
            if row.name not in report.PEERS:
                raise
            left_out[row.name] = traceback.format_exception_only(error)[-1].strip()
            print(f"{row.name} left out: {traceback.format_exc()}", flush=True)
            continue
        differences = largest_of_ranks(differences)
        rows.append(row)
        shown = dict(zip(exact, differences, strict=True)) if row.around is contextlib.nullcontext else {}
        held = row.held_bytes / 2**20
        found_rows.append({"name": row.name, "peak_mib": peak, "held_mib": held, "differences": shown})
        if dist.get_rank() == 0:
            print(f"{shape}, {tokens} tokens: {row.name} runs", flush=True)
    order = random.Random(1)
    for _ in range(args.repeats):
        for row in order.sample(rows, len(rows)):
            with row.around():
                milliseconds, host = time_once(row, hidden, grad_output)
            row.milliseconds.append(milliseconds)
            row.host_milliseconds.append(host)
    for row, found_row in zip(rows, found_rows, strict=True):
        found_row["milliseconds"] = largest_of_ranks(row.milliseconds)
        found_row["host_milliseconds"] = largest_of_ranks(row.host_milliseconds)
    if is_first and args.profile_host:
        stepped = next(row for row in rows if row.name.startswith("ours") and row.name.endswith(" steps"))
        profile_host(stepped, hidden, grad_output, args.profile_host)
    traces = {}
    if is_first:
        for row in rows:
            if row.name in report.TRACED:
                traces[row.name] = trace(row, hidden, grad_output)
    return {"shape": shape, "tokens": tokens, "rows": found_rows, "left_out": left_out, "traces": traces}


def profile_host(row: Row, hidden: Tensor, grad_output: Tensor, path: Path) -> None:
    """What the host does while it launches steps, on the first rank: the functions that take longest by themselves."""
    profiler = cProfile.Profile()
    with row.around(), torch.autograd.set_multithreading_enabled(False):  # the backward pass too is on this thread
        measure.step(row.candidate, hidden, grad_output)
        for _ in range(PROFILED_STEPS):
            dist.barrier()
            torch.cuda.synchronize()
            profiler.enable()
            measure.step(row.candidate, hidden, grad_output)
            profiler.disable()
    torch.cuda.synchronize()
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            print(f"{PROFILED_STEPS} steps of: {row.name}", file=file)
            pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(60)


def trace(row: Row, hidden: Tensor, grad_output: Tensor) -> list[tuple[str, int, float, float]]:
    """``(kernel or copy, stream, start, duration)`` in microseconds, of one step on this rank."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            dist.barrier()
            torch.cuda.synchronize()
            with torch.profiler.record_function("one step"):
                torch.cuda._sleep(HEAD_START)
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


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=tuple(KINDS), default="mlp")
    parser.add_argument("--sizes", nargs="+", default=["8192x28672", "4096x14336"], help="hidden x ffn_hidden")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8192, 16384])
    parser.add_argument("--sequence", type=positive, default=8192, help="tokens of a sequence of a layer")
    parser.add_argument("--attention", default="flash", choices=("auto", "fused", "flash", "unfused"))
    parser.add_argument("--steps", type=at_least(2), nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--repeats", type=at_least(2), default=15)
    parser.add_argument("--fused-ops", action="store_true", help="torch's fused collectives and products, of an MLP")
    parser.add_argument("--userbuffers", action="store_true")
    parser.add_argument("--profile-host", type=Path, metavar="FILE", help="where the host's time goes, in steps")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args(given)
    if args.userbuffers and len(args.sizes) * len(args.tokens) > 1:
        parser.error("--userbuffers takes one size and one number of tokens: its buffers are of one shape")
    if args.fused_ops and args.what != "mlp":
        parser.error(f"--fused-ops: not with --what {args.what}")
    for tokens in args.tokens if args.what == "layer" else []:
        if tokens % args.sequence:
            parser.error(f"--tokens {tokens}: must be a multiple of --sequence {args.sequence}")
    return args


def main() -> None:
    args = arguments()
    initialize()
    origin = Origin.now(PACKAGES, machine(several=True))
    name = f"{origin.date}-tp-overlap{'-layer' * (args.what == 'layer')}-tp{dist.get_world_size()}"
    name += "-fused-ops" * args.fused_ops + "-userbuffers" * args.userbuffers
    record: dict[str, Any] = {"origin": asdict(origin), "tp": dist.get_world_size(), "repeats": args.repeats}
    record |= {"what": args.what, "connections": os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], "transport": "", "runs": []}
    if args.what == "layer":
        record |= {"sequence": args.sequence, "attention": args.attention, "query_groups": QUERY_GROUPS}
    for tokens in args.tokens:
        for size in args.sizes:
            hidden_size, ffn_hidden_size = map(int, size.split("x"))
            record["runs"].append(run_size((hidden_size, ffn_hidden_size), tokens, args, not record["runs"]))
            torch.cuda.empty_cache()
            if dist.get_rank() == 0:  # after each size: a run that is stopped leaves those that are done
                from megatron_tiling.tiles.symmetric import symmetric_bytes

                record["transport"] = "symmetric memory" if symmetric_bytes() else "collectives: no symmetric memory"
                path = args.results / f"{name}.json"
                path.write_text(json.dumps(record) + "\n")
                print(report.write(path), flush=True)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

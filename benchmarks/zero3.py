"""Tiled against dense ZeRO-3 on one host: parameter memory of a layer, time of a step, loss, collectives.

    python -m benchmarks.zero3 [--layouts 1x1 2x1 1x2 2x2] [--tiles 4 8 16] [--hosts 1] [--results DIR]

A layout is tensor parallel x data parallel, and takes as many GPUs, or half of them with ``--hosts 2``
(tests/support/hosts.py), to see losses and memory. Without a GPU it runs over gloo at sizes given by ``--small``, to
see that it runs. Every layout is a torchrun of its own; ``<date>-zero3.md`` holds all tables.

* Memory: two MLPs with 16 tokens, parameters offloaded to host memory, so that what the GPU holds of them is what is
  gathered. Peak beyond what is held between steps, in the forward pass (no gradients there) and in the whole step.
  Tiled and dense run with and without fetching ahead: the comparison is between rows of the same kind.
* Time: a GPT of two layers trained by the engines in turn, nothing offloaded. Dense with DeepSpeed's default
  thresholds, which keep all of so small a model gathered, and with the tiles' thresholds for a whole layer, as a deep
  model is trained. Tiles keep pre-activations (``--tiled-mlp-keep all``) unless fc1 is recomputed, as it is by default.
  ZeRO-3 costs host time for each tile and step (autograd, gather, reduction): what a tile computes must outlast it.
* Loss: 20 iterations in float32 against a dense Megatron model that no one partitions, AdamW, clipped.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import above_zero, output_folder, positive
from benchmarks.record import RESULTS, Origin, machine

MIB = 2**20
PARTS = ["loss", "collectives", "time", "memory"]
SIZES = {
    False: {"mlp": (4096, 16384, 2), "gpt": (2, 4096, 14336, 8192, 2048, (2, 4, 8)), "steps": 12},
    True: {"mlp": (64, 256, 2), "gpt": (2, 48, 80, 128, 24, (1, 2)), "steps": 2},
}
"""By ``--small``: hidden, ffn, depth; layers, hidden, ffn, words, sequence, batches; timed steps of each engine."""


def measure_memory(small: bool, tile_counts: list[int]) -> list[dict[str, Any]]:
    """A row for dense and each number of tiles, with and without fetching ahead."""
    import torch

    from benchmarks.zero3_runs import MLPStack, engine_of, forget, transformer

    hidden_size, ffn, depth = SIZES[small]["mlp"]
    config = transformer(num_layers=1, hidden_size=hidden_size, ffn_hidden_size=ffn)
    offload = {name: {"device": "cpu", "pin_memory": False} for name in ("offload_param", "offload_optimizer")}
    rows = []
    for tiles in (None, *tile_counts):
        for ahead in (False, True):
            largest = hidden_size * ffn // config.tensor_model_parallel_size * (1 if tiles is None else 2)
            unit = largest // (tiles or 1)
            zero = offload | {
                "stage3_max_live_parameters": unit + 1,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": unit if ahead else 0,
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": unit,
            }
            engine = engine_of(
                config, partial(MLPStack, config, depth, tiles), zero, lambda groups: torch.optim.SGD(groups, lr=1e-9)
            )
            hidden = torch.randn(16, 1, hidden_size, dtype=torch.bfloat16, device=engine.device, requires_grad=True)
            for _ in range(4):  # the engine records two passes before it fetches ahead
                forward, step = peaks(engine, hidden)
            rows.append(
                {"tiles": tiles, "ahead": ahead, "unit": unit * 2 / MIB, "forward": forward / MIB, "step": step / MIB}
            )
            forget(engine)
    return rows


def peaks(engine: Any, hidden: Any) -> tuple[int, int]:
    """Bytes at the peak of a forward pass and of a whole step, beyond what was held before."""
    import torch

    on_gpu = hidden.is_cuda

    def start() -> int:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if on_gpu else 0

    def peak(before: int) -> int:
        if not on_gpu:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    before = start()
    loss = engine(hidden)
    forward = peak(before)
    engine.backward(loss)
    engine.step()
    return forward, peak(before)


def measure_time(small: bool, tile_counts: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of a training step for each batch size, engines in turn in random order."""
    import torch
    from megatron.core import parallel_state

    from benchmarks.zero3_runs import DEFAULTS, engine_of, forget, gpt, transformer
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import as_flag, coarser_splits
    from megatron_tiling.zero3 import engine as zero3
    from megatron_tiling.zero3.config import TileSizes, with_thresholds

    layers, hidden_size, ffn, words, sequence, batches = SIZES[small]["gpt"]
    config = transformer(
        num_layers=layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn,
        num_attention_heads=4 if small else 32,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        normalization="RMSNorm",
    )
    fc1 = 2 * ffn * hidden_size // config.tensor_model_parallel_size
    a_layer = with_thresholds({"zero_optimization": {}}, TileSizes(fc1, fc1, fc1))["zero_optimization"]
    kinds: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
        "dense": (None, DEFAULTS),
        "dense, a layer at a time": (None, a_layer),
    }
    for tiles in tile_counts:
        keeping = {"factor": tiles, "mlp_keep": "all"}
        with zero3.on_meta(config):
            built = tile(gpt(config, words, sequence, None), TilingConfig(factor=tiles, storage="partitioned"))
        splits = coarser_splits(built)
        kinds[f"{tiles} tiles"] = (keeping, {})
        kinds[f"{tiles} tiles, {as_flag(splits)}"] = (keeping | {"splits": splits}, {})
    few = tile_counts[0]
    kinds[f"{few} tiles, DeepSpeed's hooks"] = ({"factor": few, "mlp_keep": "all"}, {})
    kinds[f"{few} tiles, fc1 recomputed"] = ({"factor": few, "mlp_keep": 0}, {})
    engines = {}
    for name, (tiling, zero) in kinds.items():
        build = partial(gpt, config, words, sequence, tiling)
        engines[name] = engine_of(
            config,
            build,
            zero,
            lambda groups: torch.optim.AdamW(groups, lr=1e-4),
            deepspeed_gathers=name.endswith("DeepSpeed's hooks"),
        )
    device = engines["dense"].device
    mask = torch.triu(torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=device), 1)
    group = parallel_state.get_data_parallel_group()

    def seconds(engine: Any, batch: int) -> float:
        tokens = torch.randint(0, words, (batch, sequence), device=device)
        positions = torch.arange(sequence, device=device).expand(batch, sequence)
        torch.distributed.barrier(group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        engine.backward(engine(tokens, positions, mask, labels=tokens).mean())
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = []
    order = list(engines)
    shuffled = random.Random(0)  # the same order on every rank
    for batch in batches:
        times: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            for _ in range(4):
                seconds(engine, batch)
        for _ in range(SIZES[small]["steps"]):
            shuffled.shuffle(order)
            for name in order:
                times[name].append(seconds(engines[name], batch))
        rows += [
            {"name": name, "tokens": batch * sequence, "median": statistics.median(taken), "all": taken}
            for name, taken in times.items()
        ]
    for engine in engines.values():
        forget(engine)
    return rows


def measure_loss() -> dict[str, float]:
    """Largest relative differences to dense of losses and gradient norms over 20 iterations, in float32."""
    from megatron.core import parallel_state

    from benchmarks.zero3_runs import forget
    from tests.zero3 import small_gpt

    small_gpt.TENSOR_PARALLEL = parallel_state.get_tensor_model_parallel_world_size()
    losses, norms = small_gpt.train_dense(small_gpt.transformer())
    engine = small_gpt.engine_of(small_gpt.transformer(), tiled=True, thresholds={})
    tiled_losses, tiled_norms = small_gpt.train_zero3(engine)
    forget(engine)

    def difference(actual: list[float], expected: list[float]) -> float:
        return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))

    return {
        "first": difference(tiled_losses[:1], losses[:1]),  # not rounding: the initial weights differ
        "loss": difference(tiled_losses, losses),
        "norm": difference(tiled_norms, norms),
    }


def measure_collectives() -> dict[str, int]:
    from benchmarks import zero3_collectives
    from benchmarks.zero3_runs import transformer
    from tests.support.harness import Counter

    return zero3_collectives.count(Counter, transformer(num_layers=1, hidden_size=256, ffn_hidden_size=1024), factor=2)


def run_layout(tensor: int, small: bool, tile_counts: list[int], wanted: list[str], path: Path) -> None:
    """One layout, in a process of torchrun's."""
    import torch

    from benchmarks.zero3_runs import megatron

    parts: dict[str, Callable[[], Any]] = {
        "loss": measure_loss,
        "collectives": measure_collectives,
        "time": lambda: measure_time(small, tile_counts[:2]),
        "memory": lambda: measure_memory(small, tile_counts),
    }
    record: dict[str, Any] = {"machine": machine()}
    with megatron(tensor):
        for name in wanted:
            start = time.perf_counter()
            try:
                record[name] = parts[name]()
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                record.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if torch.distributed.get_rank() == 0:
                print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
                path.write_text(json.dumps(record))


def markdown(record: dict[str, Any]) -> str:
    lines = Origin(**record["origin"]).head("Tiled and dense ZeRO-3")
    lines += [line.strip() for line in (__doc__ or "").split("\n\n")[-1].splitlines()]
    for layout, run in record["layouts"].items():
        lines += ["", f"## TP x DP = {layout}, {run['machine']}", ""]
        if "memory" in run:
            lines += memory_table(run["memory"])
        if "time" in run:
            lines += time_table(run["time"])
        if "loss" in run:
            lines += ["", f"Largest relative difference to dense over 20 iterations: loss {run['loss']['loss']:.1e} "]
            lines[-1] += f"({run['loss']['first']:.1e} at the first), "
            lines[-1] += f"gradient norm {run['loss']['norm']:.1e}."
        if any(run.get("collectives", {}).values()):
            counts = ", ".join(f"{name} {number}" for name, number in run["collectives"].items())
            lines += [
                "",
                f"All-reduces of one MLP's forward pass at tile factor 2: {counts}.",
            ]
        lines += [f"\n{name}: failed: {reason}" for name, reason in run.get("failed", {}).items()]
    return "\n".join(lines) + "\n"


def time_table(rows: list[dict[str, Any]]) -> list[str]:
    steps = {
        row["tokens"]: {one["name"]: one["median"] for one in rows if one["tokens"] == row["tokens"]} for row in rows
    }
    header = [f"{tokens} tokens, ms | of dense" for tokens in steps]
    lines = ["", f"| step of a GPT | {' | '.join(header)} |", "|---" * (1 + 2 * len(steps)) + "|"]
    for name in next(iter(steps.values())):
        cells = [f"{medians[name] * 1e3:.1f} | {medians[name] / medians['dense']:.3f}" for medians in steps.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | fetch ahead | gathered at once, MiB | forward, MiB | of dense | 2/T | step, MiB | of dense |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        dense = next(one for one in rows if one["tiles"] is None and one["ahead"] == row["ahead"])
        name = "dense" if row["tiles"] is None else f"{row['tiles']} tiles"
        target = "" if row["tiles"] is None else f"{2 / row['tiles']:.3f}"
        lines.append(
            f"| {name} | {'yes' if row['ahead'] else 'no'} | {row['unit']:.1f} | {row['forward']:.1f} "
            f"| {row['forward'] / (dense['forward'] or 1):.3f} | {target} | {row['step']:.1f} "
            f"| {row['step'] / (dense['step'] or 1):.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x1", "1x2", "2x2"], help="tensor x data parallel")
    parser.add_argument("--tiles", type=positive, nargs="+", default=[4, 8, 16])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--hosts", type=positive, default=1, help="hosts that this one plays, sharing its GPUs")
    parser.add_argument("--small", action="store_true", help="sizes for a dry run on CPUs")
    parser.add_argument("--seconds", type=above_zero, default=180, help="limit of one layout")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--one-layout-into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    layouts = [tuple(map(int, layout.split("x"))) for layout in args.layouts]
    if args.one_layout_into:
        ((tensor, _),) = layouts
        run_layout(tensor, args.small, args.tiles, args.parts, args.one_layout_into)
        return
    options = f"--layouts {' '.join(args.layouts)} --tiles {' '.join(map(str, args.tiles))}" + " --small" * args.small
    options += f" --hosts {args.hosts}" * (args.hosts > 1)
    if args.parts != PARTS:
        options += f" --parts {' '.join(args.parts)}"
    from tests.support.hosts import OUT_OF_TIME, torchrun

    origin = Origin.now(("torch", "megatron-core", "deepspeed"), "", options)  # each layout tells its machine
    record: dict[str, Any] = {"origin": asdict(origin), "layouts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (tensor, data) in zip(args.layouts, layouts, strict=True):
            path = Path(folder) / f"{name}.json"
            command = [__file__, "--layouts", name, "--one-layout-into", str(path), "--parts", *args.parts]
            command += ["--tiles", *map(str, args.tiles), *["--small"] * args.small]
            environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "4"} | os.environ
            status = torchrun(command, tensor * data, environment, args.hosts, seconds=args.seconds)
            if status:
                print(f"{name}: exit {status}{', out of time' if status == OUT_OF_TIME else ''}", flush=True)
            if path.exists():
                record["layouts"][name] = json.loads(path.read_text())
            write(record, args.results)


def write(record: dict[str, Any], results: Path) -> None:
    path = results / f"{record['origin']['date']}-zero3.md"
    path.with_suffix(".json").write_text(json.dumps(record))
    path.write_text(markdown(record))


if __name__ == "__main__":
    main()

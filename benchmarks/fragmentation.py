"""The memory-centric tiling experiment: the largest transformer layer that trains while GPU memory lies in pieces.

    python -m benchmarks.fragmentation [--piece-mib 2048] [--tiles 1 4 16 64] [--seconds 330] [--results DIR]

ZeRO-Infinity (arXiv:2104.07857, figure 6b) fragments the GPU's memory into pieces of 2 GB, so that a larger weight
finds no place, and looks for the largest hidden size of one layer. Here the layer has h x h attention and a 4h MLP, in
bf16; parameters are offloaded to host memory (ZeRO-3 ``offload_param``), each linear layer is cut into T tiles, and a
trial is one forward and one backward pass of 16 tokens. Gradients are dropped as they are made: their copies and the
optimizer's would take eight times the parameters' host memory. The largest tile has 8 h^2 / T bytes, so the limit on h
is the square root of ``piece x T / 8``, or of ``host memory / 24``, which is reported as such.

Ours (partitioned Megatron layers) and DeepSpeed's TiledLinear run in turn, in one process on the same pieces. On one
H100 a trial moves the layer three times over PCIe: about a second for 1 GB of parameters.
"""

import argparse
import gc
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import above_zero, output_folder, positive
from benchmarks.record import RESULTS, Origin, machine
from benchmarks.zero3_runs import forget, megatron, quiet_engine, transformer
from megatron_tiling.partitioned.layers import PartitionedColumnParallelLinear, PartitionedRowParallelLinear
from megatron_tiling.tiles.ownership import whole_size
from megatron_tiling.zero3 import engine as zero3
from megatron_tiling.zero3.gather import TileGathering
from megatron_tiling.zero3.host_memory import available_host_memory

MIB, GIB = 2**20, 2**30
STEP = 1024  # of hidden sizes tried
HEADS = 8
HOST_RESERVE = 6 * GIB
BLOCKER = 2 * MIB
SLACK = MIB  # of a piece, so that a tile of exactly its size fits


class Layer(torch.nn.Module):
    """One pre-norm transformer layer. The widest linear layer is built first: a trial that cannot fit ends early.

    Args:
        linear: ``(in_features, out_features, is_row) -> module`` that maps ``[s, b, in]`` to ``[s, b, out]``.
    """

    def __init__(self, hidden_size: int, linear: Callable[[int, int, bool], torch.nn.Module]) -> None:
        super().__init__()
        self.fc1 = linear(hidden_size, 4 * hidden_size, False)
        self.fc2 = linear(4 * hidden_size, hidden_size, True)
        self.qkv = linear(hidden_size, 3 * hidden_size, False)
        self.proj = linear(hidden_size, hidden_size, True)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(hidden_size) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        s, b, h = hidden.shape
        heads = self.qkv(self.norms[0](hidden)).view(s, b, 3, HEADS, h // HEADS).permute(2, 1, 3, 0, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.proj(attended.permute(2, 0, 1, 3).reshape(s, b, h))
        activated = torch.nn.functional.gelu(self.fc1(self.norms[1](hidden)))
        result: Tensor = hidden + self.fc2(activated)
        return result


class _Output(torch.nn.Module):
    """A Megatron layer without its second result, the bias."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input_: Tensor) -> Tensor:
        output: Tensor = self.layer(input_)[0]
        return output


def ours(tiles: int) -> Callable[[int, int, bool], torch.nn.Module]:
    config = transformer(num_layers=1, hidden_size=HEADS, ffn_hidden_size=4 * HEADS)

    def linear(inputs: int, outputs: int, is_row: bool) -> torch.nn.Module:
        options = {"config": config, "init_method": _fill, "bias": False, "skip_bias_add": True}
        if is_row:
            options |= {"input_is_parallel": True, "in_splits": tiles, "out_splits": 1}
            return _Output(PartitionedRowParallelLinear(inputs, outputs, **options))
        options |= {"gather_output": False, "in_splits": 1, "out_splits": tiles}
        return _Output(PartitionedColumnParallelLinear(inputs, outputs, **options))

    return linear


def deepspeeds(tiles: int) -> Callable[[int, int, bool], torch.nn.Module]:
    from deepspeed.runtime.zero.tiling import TiledLinear

    def linear(inputs: int, outputs: int, is_row: bool) -> torch.nn.Module:
        splits = {"in_splits": tiles if is_row else 1, "out_splits": 1 if is_row else tiles}
        # Without a dtype, each tile is made in float32 before zero.Init casts it.
        return TiledLinear(inputs, outputs, bias=False, linear_cls=_Linear, dtype=torch.bfloat16, **splits)

    return linear


class _Linear(torch.nn.Linear):
    """Filled rather than drawn, as ours is: drawing takes longer than the trial."""

    def reset_parameters(self) -> None:
        _fill(self.weight)


def _fill(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.fill_(1e-4)


class Fragments:
    """GPU memory in pieces: inside one segment of the caching allocator, small blocks between free stretches."""

    def __init__(self, piece: int) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # cuBLAS takes its workspace first
        free, total = torch.cuda.mem_get_info()
        spare = 2 * GIB  # for the context, kernels and cuBLAS, outside the allocator
        size = (free - spare) // (piece + BLOCKER) * (piece + BLOCKER)
        whole = torch.empty(size, dtype=torch.uint8, device="cuda")
        del whole  # the segment stays, and is cut up from its start
        stretches, self.blockers = [], []
        while size >= piece + BLOCKER:
            stretches.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
            self.blockers.append(torch.empty(BLOCKER, dtype=torch.uint8, device="cuda"))
            size -= piece + BLOCKER
        self.pieces = len(stretches)
        del stretches
        # No new segment of a piece's size. Small tensors still find some room.
        allowance = min(256 * MIB, piece // 2)
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + allowance) / total)
        self.largest = self._probe(piece)

    def _probe(self, piece: int) -> int:
        """The largest block that can be allocated, to a MiB: a piece, and not one MiB more."""
        fits, too_large = 0, 2 * piece
        while too_large - fits > MIB:
            size = (fits + too_large) // 2
            try:
                torch.empty(size, dtype=torch.uint8, device="cuda")
                fits = size
            except torch.OutOfMemoryError:
                too_large = size
        assert fits <= piece, f"a block of {fits} bytes could be allocated: memory is not in pieces of {piece}"
        return fits


def trial(hidden_size: int, tiles: int, make: Callable[[int], Callable[[int, int, bool], torch.nn.Module]]) -> None:
    """Forward and backward of one layer. Raises torch.OutOfMemoryError where a tile finds no room."""
    deepspeed = zero3.import_deepspeed()
    # Without overlap there is no stream of its own for gathering, whose allocations could not use the pieces: the
    # caching allocator reuses memory within one stream.
    config = quiet_engine({"offload_param": {"device": "cpu", "pin_memory": False}, "overlap_comm": False})
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        layer = Layer(hidden_size, make(tiles))
    largest = max(map(whole_size, layer.parameters()))
    config["zero_optimization"] |= {
        "stage3_max_live_parameters": largest + 1,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": largest,
        "stage3_param_persistence_threshold": 8 * hidden_size,
    }
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    # Without optimizer, and the layer is called without the engine around it: hooks gather and release.
    engine, *_ = deepspeed.initialize(model=layer, config=config)
    if (sizes := zero3.tile_sizes(layer)) is not None:
        TileGathering(layer, elements_ahead=sizes.largest)
    hidden = torch.ones(16, 1, hidden_size, dtype=torch.bfloat16, device=engine.device, requires_grad=True)
    try:
        layer(hidden).sum().backward()
    finally:
        forget(engine)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def attempt(hidden_size: int, tiles: int, make: Any) -> tuple[bool, float]:
    """Whether a trial ends well, and its seconds. Everything is freed again."""
    start = time.time()
    try:
        trial(hidden_size, tiles, make)
        fits, reason = True, ""
    except torch.OutOfMemoryError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        fits, reason = False, f" ({wanted and wanted[1]} in {place.name}, {Path(place.filename).name})"
    gc.collect()
    seconds = time.time() - start
    outcome = "trains" if fits else f"out of memory{reason}"
    print(f"{make.__name__}, {tiles} tiles, hidden {hidden_size}: {outcome}, {seconds:.1f} s", flush=True)
    return fits, seconds


def largest(fits: Callable[[int], bool], expected: int, bound: int, step: int = STEP) -> tuple[int, str]:
    """The largest hidden size that trains, by bisection around the expected one, and what limits it.

    Args:
        fits: whether a hidden size trains; monotonous.
        expected: where the search begins; a good guess makes it two trials long.
        bound: no larger size is tried: host memory.
    """
    expected, bound = max(step, expected // step * step), bound // step * step
    first = min(expected, bound)
    if fits(first):
        good, bad = first, None
        while bad is None and good < bound:
            candidate = min(good + (step if good == first else good - first + step), bound)
            good, bad = (candidate, None) if fits(candidate) else (good, candidate)
        if bad is None:
            return good, "host memory"
    else:
        good, bad = 0, first
    while bad - good > step:
        middle = (good + bad) // 2 // step * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, "pieces"


def search(
    tile_counts: list[int], piece: int, host: int, seconds: float, done: Callable[[list[dict[str, Any]]], None]
) -> None:
    """A row for each number of tiles, ours and DeepSpeed's; ``done`` is given all rows so far after each of them."""
    rows: list[dict[str, Any]] = []
    deadline, bound = time.time() + seconds, math.isqrt((host - HOST_RESERVE) // 24)
    for tiles in tile_counts:
        for make in (ours, deepspeeds):
            row: dict[str, Any] = {"tiles": tiles, "name": make.__name__, "trials": []}
            rows.append(row)

            def fits(hidden_size: int, row: Any = row, tiles: int = tiles, make: Any = make) -> bool:
                if time.time() > deadline:
                    raise TimeoutError("no time was left for the next trial")
                fitted, took = attempt(hidden_size, tiles, make)
                row["trials"].append((hidden_size, fitted, took))
                return fitted

            try:
                row["hidden"], row["limit"] = largest(fits, math.isqrt(piece * tiles // 8), bound)
            except Exception as error:  # the other rows are worth having
                traceback.print_exc()
                row["hidden"] = max((size for size, fitted, _ in row["trials"] if fitted), default=None)
                row["limit"] = f"not found: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            done(rows)


def markdown(record: dict[str, Any]) -> str:
    rows = record["rows"]
    untiled = {row["name"]: row["hidden"] for row in rows if row["tiles"] == 1}
    title = "Largest hidden size of one transformer layer in fragmented memory"
    lines = [
        *Origin(**record["origin"]).head(title, f"{record['host_gib']:.0f} GiB of host memory to use"),
        f"{record['pieces']} pieces of {record['piece_mib']} MiB; the largest block that a probe could allocate has "
        f"{record['probe_mib']} MiB. bf16 parameters offloaded to host memory, forward and backward of 16 tokens, "
        "gradients dropped as they are made, no optimizer. 'of root T': growth over one tile, over the square root of "
        "the number of tiles. Host memory holds 24 h^2 bytes of parameters.", "",
        "| tiles a layer | | largest hidden size | parameters, billions | of root T | limited by | trials, s |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        hidden, base = row["hidden"], untiled.get(row["name"])
        growth = f"{hidden / base / math.sqrt(row['tiles']):.2f}" if hidden and base else ""
        name = {"ours": "ours", "deepspeeds": "DeepSpeed TiledLinear"}[row["name"]]
        size = f"{12 * hidden**2 / 1e9:.2f}" if hidden else ""
        tried = ", ".join(f"{h}: {took:.1f}{'' if ok else ' (out of memory)'}" for h, ok, took in row["trials"])
        lines.append(f"| {row['tiles']} | {name} | {hidden} | {size} | {growth} | {row['limit']} | {tried} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece-mib", type=positive, default=2048)
    parser.add_argument("--tiles", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--host-gib", type=above_zero, default=120, help="host memory to use at most, of what is available"
    )
    parser.add_argument("--seconds", type=above_zero, default=330, help="no trial starts later")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        parser.error("expandable segments move pieces together: leave them out of PYTORCH_CUDA_ALLOC_CONF")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with megatron(tensor_parallel=1):
        fragments = Fragments(args.piece_mib * MIB + SLACK)
        host = min(available_host_memory(), int(args.host_gib * GIB))
        options = f"--piece-mib {args.piece_mib} --tiles {' '.join(map(str, args.tiles))} "
        options += f"--host-gib {args.host_gib:.0f} --seconds {args.seconds:.0f}"
        origin = Origin.now(("torch", "megatron-core", "deepspeed"), machine(), options)
        record = {
            "origin": asdict(origin),
            "host_gib": host / GIB,
            "piece_mib": args.piece_mib,
            "pieces": fragments.pieces,
            "probe_mib": fragments.largest // MIB,
        }
        path = args.results / f"{origin.date}-fragmentation-{args.piece_mib}.md"

        def write(rows: list[dict[str, Any]]) -> None:
            path.with_suffix(".json").write_text(json.dumps(record | {"rows": rows}))
            path.write_text(markdown(record | {"rows": rows}))

        search(args.tiles, args.piece_mib * MIB, host, args.seconds, write)
    print(path.read_text())


if __name__ == "__main__":
    main()

"""The rates of this machine's GPUs, timed, as the planner's clock takes them.

    torchrun --nproc-per-node N -m megatron_tiling.plan.rates RECORD ATTENTION

Rank 0 writes RECORD, of JSON: ``gpu``, the fields of a ``Gpu``; ``error``, of the products that it was fitted to;
``attention``, whether that was timed; ``kept``, what was not, and why. ATTENTION is what Megatron's
--attention-backend says, or "none". All ranks time the same at once, as they train. Kernels run until they are warm: a
GPU at its power limit is slower than a cold one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tiling.plan.clock import FEW_KEYS, Gpu, shipped_rates, useful_share

TOKENS, HIDDEN = 8192, 4096
WIDTHS = (28672, 14336, 7168, 3584, 1792, 896)
#: Rows, inner features and columns: of linear layers of these widths in both directions, and their weight gradients.
PRODUCTS = tuple(
    shape for width in WIDTHS for shape in ((TOKENS, HIDDEN, width), (TOKENS, width, HIDDEN), (width, TOKENS, HIDDEN))
)
Shape = tuple[int, int, int]
ATTENTION_TOKENS, HEADS, GROUPS, HEAD_WIDTH = 16384, 32, 8, 128
#: Seconds.
WARM_UP, AT_LEAST = 1.5, 0.06
REDUCED_BYTES = 2**28


def seconds(run: Callable[[], object], times: int = 0) -> float:
    """Of one ``run`` of many in a row, on the GPU: as many as take ``AT_LEAST``, or as given."""
    if not times:
        times = min(max(math.ceil(AT_LEAST / seconds(run, 2)), 3), 200)
    run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    stop.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(stop) / 1000 / times, 1e-9)


def warm_up() -> None:
    """Products for ``WARM_UP``."""
    left, right = (torch.randn(2 * HIDDEN, 2 * HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    once = seconds(lambda: left @ right, times=5)
    seconds(lambda: left @ right, times=min(math.ceil(WARM_UP / once), 5000))


def product_seconds(shape: Shape) -> float:
    """Of a product in bf16 of values as in training: those of zeros take less power."""
    rows, inner, columns = shape
    left, right = (torch.randn(size, inner, device="cuda", dtype=torch.bfloat16) for size in (rows, columns))
    return seconds(lambda: left @ right.t())


def traffic(shape: Shape) -> int:
    """Bytes that a product reads and writes."""
    rows, inner, columns = shape
    return 2 * (rows * inner + inner * columns + rows * columns)


def bandwidth() -> float:
    """Bytes/s of three kernels that add, copy and cast."""
    x, y, z = (torch.randn(TOKENS, 4 * HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    wide = torch.empty_like(x, dtype=torch.float32)
    taken = [seconds(run) for run in (lambda: torch.add(x, y, out=z), lambda: z.copy_(x), lambda: wide.copy_(x))]
    return (3 + 2 + 3) * x.nbytes / sum(taken)


def fitted(times: Mapping[Shape, float], processors: int, bandwidth: float) -> tuple[float, float, float]:
    """FLOP/s of products and the share of their traffic that shows, by least squares; and the largest error."""
    best = math.inf, 0.0, 0.0, 0.0
    for share in (step / 50 for step in range(51)):
        work = {
            shape: 2.0 * math.prod(shape) / useful_share(shape[0], shape[2], 1, processors) / taken
            for shape, taken in times.items()
        }
        rest = {shape: 1 - share * traffic(shape) / bandwidth / taken for shape, taken in times.items()}
        rate = sum(each**2 for each in work.values()) / sum(work[shape] * rest[shape] for shape in times)
        errors = [work[shape] / rate - rest[shape] for shape in times]
        if rate > 0:
            best = min(best, (sum(error**2 for error in errors), rate, share, max(map(abs, errors))))
    return best[1:]


def attention(backend: str, bandwidth: float) -> tuple[float, float]:
    """FLOP/s, forward and backward, of TransformerEngine's causal attention.

    Raises:
        Exception: it has none here; of many kinds.
    """
    if backend != "auto":
        for name in ("flash", "fused", "unfused"):
            os.environ[f"NVTE_{name.upper()}_ATTN"] = str(int(name == backend))
    import transformer_engine.pytorch as te

    attend: Any = te.DotProductAttention(
        HEADS, HEAD_WIDTH, num_gqa_groups=GROUPS, qkv_format="bshd", attn_mask_type="causal", attention_dropout=0.0
    )
    query, key, value = (
        torch.randn(1, ATTENTION_TOKENS, heads, HEAD_WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    grad = torch.randn(1, ATTENTION_TOKENS, HEADS * HEAD_WIDTH, device="cuda", dtype=torch.bfloat16)

    def both() -> None:
        attend(query, key, value).view_as(grad).backward(grad)
        query.grad = key.grad = value.grad = None

    both()
    forward = seconds(lambda: attend(query, key, value))
    # The clock counts apart that gradients in float32 are cleared, added to and cast.
    beside = 3 * 4 * (query.numel() + key.numel() + value.numel()) / bandwidth if backend == "flash" else 0.0
    backward = max(seconds(both) - forward - beside, forward)
    keys = ATTENTION_TOKENS / 2
    flops = 2.0 * query.numel() * keys * (1 + FEW_KEYS / keys)
    return 2 * flops / forward, 5 * flops / backward


def link(world: int) -> float:
    """Bytes/s between GPUs: of a sum over all of them."""
    values = torch.zeros(REDUCED_BYTES // 2, device="cuda", dtype=torch.bfloat16)
    taken = seconds(lambda: torch.distributed.all_reduce(values), times=20)
    return 2 * (1 - 1 / world) * REDUCED_BYTES / taken


def timed(backend: str, world: int) -> dict[str, Any]:
    """The record."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    kept: list[str] = []
    warm_up()
    found: dict[str, Any] = {"processors": properties.multi_processor_count, "bandwidth": bandwidth()}
    times = {shape: product_seconds(shape) for shape in PRODUCTS}
    found["products"], found["product_traffic"], error = fitted(times, found["processors"], found["bandwidth"])
    if backend not in ("none", "unfused"):
        try:
            found["attention"], found["attention_backward"] = attention(backend, found["bandwidth"])
        except Exception as failure:  # what TransformerEngine and its kernels raise, and they are many
            kept.append(f"attention ({type(failure).__name__}: {' '.join(str(failure).split())[:200]})")
    if world > 1:
        found["link"] = link(world)
    gpu = dataclasses.replace(shipped_rates(properties.name), **found)
    return {"gpu": dataclasses.asdict(gpu), "error": error, "attention": "attention" in found, "kept": kept}


def described(gpu: Gpu, error: float, attention: bool, world: int) -> str:
    """What was timed, in a few words; ``attention`` if it was."""
    words = [
        f"products {gpu.products / 1e12:.0f} TFLOP/s (fitted within {error:.0%}), {gpu.bandwidth / 1e12:.2f} TB/s",
    ]
    if attention:
        words.append(f"attention {gpu.attention / 1e12:.0f} and {gpu.attention_backward / 1e12:.0f} TFLOP/s")
    if world > 1:
        words.append(f"between GPUs {gpu.link / 1e9:.0f} GB/s")
    return ", ".join(words)


def main() -> None:
    """One rank."""
    record, backend = sys.argv[1:]
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1:
        torch.distributed.init_process_group("nccl")
    found = timed(backend, world)
    if rank == 0:
        Path(record).write_text(json.dumps(found))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

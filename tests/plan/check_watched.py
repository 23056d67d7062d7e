"""``megatron_tiling.plan.watched`` on a CPU: what torch.cuda answers comes from here.

torchrun -m tests.plan.check_watched [--history] RECORD SCRIPT ARGS

The allocator's memory grows by one GiB whenever its peak is read, and falls back at the last step. With
FAKE_OUT_OF_MEMORY=dense the third step's first attention raises what a full GPU does, unless layers are tiled.
"""

import os
import sys
from typing import Any

import torch

from megatron_tiling.plan import watched

GIB = 2**30


class Allocator:
    """Stands for torch.cuda's."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self) -> dict[str, Any]:
        self.peak += GIB
        return {"allocated_bytes": {"all": {"peak": self.peak}}}

    def reset(self) -> None:
        self.peak = 0


def fail_in_attention() -> None:
    from megatron.core.transformer.attention import Attention

    calls: list[int] = []
    stock = Attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:  # two layers, two steps
            raise torch.OutOfMemoryError("CUDA out of memory. By a test.")
        return stock(self, *args, **kwargs)

    Attention.forward = forward


def main() -> None:
    cuda: Any = torch.cuda
    allocator = Allocator()
    cuda.memory_stats_as_nested_dict = allocator.look
    cuda.reset_peak_memory_stats = allocator.reset
    cuda.max_memory_allocated = lambda: allocator.peak
    cuda.memory_allocated = lambda: 5 * GIB
    cuda.max_memory_reserved = lambda: 100 * GIB
    cuda.memory_reserved = lambda: 90 * GIB
    cuda.mem_get_info = lambda: (10 * GIB, 140 * GIB)
    trace = [
        {"action": action, "size": size, "time_us": 2**62} for action, size in
        (("alloc", GIB), ("segment_alloc", GIB), ("alloc", 1), ("free_requested", GIB), ("free_completed", GIB))
    ]  # fmt: skip
    cuda.memory._record_memory_history = lambda enabled, **options: None
    cuda.memory._snapshot = lambda: {"device_traces": [trace]}
    if os.environ.get("FAKE_OUT_OF_MEMORY") == "dense" and "--use-tiled-linear" not in sys.argv:
        fail_in_attention()
    watched.main()


if __name__ == "__main__":
    main()

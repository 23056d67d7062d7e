"""A training script whose third step is watched: its peak of memory, and what ran when that was reached.

    torchrun --nproc-per-node N -m benchmarks.watched_run RECORD SCRIPT [ARGS of the script]

A part of ``plan_runs``. Rank R writes RECORD.R.json. Nothing is allocated for it: when a module of a kind begins or
ends, in the forward pass by its call, in the backward pass by gradients of its output and input, the peak so far is
read, and belongs to what has run since it was read last.
"""

import functools
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

WATCHED_STEP = 3


class Watch:
    """What runs, and what ran at the peak, while it is ``on``."""

    def __init__(self, peak: Callable[[], int] = torch.cuda.max_memory_allocated) -> None:
        self.on = False
        self.running: list[str] = []
        self.bytes, self.phase = 0, ""
        self._peak = peak

    def begin(self, phase: str) -> None:
        self._see()
        self.running.append(phase)

    def end(self, phase: str) -> None:
        """The last that has begun under that name, and all that began in it and did not end."""
        self._see()
        if phase in self.running:
            del self.running[len(self.running) - 1 - self.running[::-1].index(phase) :]

    def _see(self) -> None:
        if self.on and (peak := self._peak()) > self.bytes:
            self.bytes, self.phase = peak, self.running[-1] if self.running else "other"

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.begin(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.end(phase)

        return call

    def module_calls(self, owner: Any, kind: str) -> None:
        """Calls of modules of this class, forward and backward, are phases. At the class: hooks would untile layers."""
        stock, backward = self.during(kind, owner.__call__), f"{kind}, backward"

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = stock(module, *args, **kwargs)
            for tensors, at in (((args, kwargs), self.end), (result, self.begin)) if self.on else ():
                for tensor in tree_leaves(tensors):
                    if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda _, at=at: at(backward))
                        break
            return result

        owner.__call__ = call


def main() -> None:
    """Run the script that ``sys.argv`` names."""
    record, script, *arguments = sys.argv[1:]
    from megatron_tiling.trainer.install import install

    install()
    from megatron.training import training

    from megatron_tiling.trainer.phases import module_kinds

    watch = Watch()
    for owner, kind in module_kinds().items():
        watch.module_calls(owner, kind)
    stock_step = training.train_step
    steps: list[int] = []

    @functools.wraps(stock_step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(stock_step).bind(*args, **kwargs).arguments
        if not steps:
            optimizer, config = call["optimizer"], call["config"]
            optimizer.step = watch.during("optimizer step", optimizer.step)
            config.finalize_model_grads_func = watch.during("gradient reduction", config.finalize_model_grads_func)
        steps.append(1)
        if len(steps) < WATCHED_STEP:
            return stock_step(*args, **kwargs)
        torch.cuda.synchronize()
        before = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        watch.on = True
        result = stock_step(*args, **kwargs)
        watch.end("")
        watch.on = False
        found = {
            "peak": torch.cuda.max_memory_allocated(), "phase": watch.phase, "earlier peak": before[0],
            "held": before[1], "reserved": torch.cuda.max_memory_reserved(),
            "outside": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(),
            "loss": {name: float(value) for name, value in result[0].items()},
        }  # fmt: skip
        Path(f"{record}.{os.environ['RANK']}.json").write_text(json.dumps(found))
        return result

    training.train_step = train_step
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

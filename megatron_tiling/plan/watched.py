"""Some steps of a training script on GPUs: how long they take, and what the last one needs of memory, and when.

    torchrun --nproc-per-node N -m megatron_tiling.plan.watched [--history] RECORD SCRIPT [ARGS of the script]

Rank R writes RECORD.R.json, and the run ends. Tokens are random, no checkpoint is read, and nothing else is written.
Nothing is allocated to watch: when a module of a kind begins or ends, in the forward pass by its call, in the backward
pass by gradients of its output and input, the peak so far is read, and belongs to what has run since it was read last.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_tiling import runner
from megatron_tiling.plan import look
from megatron_tiling.plan.curve import thinned
from megatron_tiling.plan.tracker import BLOCK
from megatron_tiling.tiles.symmetric import symmetric_bytes

#: The first one warms up. The last one is watched, which costs the host time: those between say how long a step takes.
STEPS = 5
#: In a record, of a rank that dies of memory: what it was doing.
OUT_OF_MEMORY = "out of memory"


def _peak() -> int:
    """As ``torch.cuda.max_memory_allocated``, which takes as long as a kernel."""
    return int(torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["peak"])


class Watch:
    """What runs, and what ran at the peak, while it is ``on``.

    Args:
        peak: bytes so far.
        on_look: is called whenever the peak is read.
    """

    def __init__(self, peak: Callable[[], int] = _peak, on_look: Callable[[], object] | None = None) -> None:
        self.on = False
        self.running: list[str] = []
        self.bytes, self.phase = 0, ""
        self._peak, self._on_look = peak, on_look

    def begin(self, phase: str) -> None:
        self._see()
        self.running.append(phase)

    def end(self, phase: str) -> None:
        """The last that has begun under that name, and all that began in it and did not end."""
        self._see()
        if phase in self.running:
            del self.running[len(self.running) - 1 - self.running[::-1].index(phase) :]

    def _see(self) -> None:
        if not self.on:
            return
        if (peak := self._peak()) > self.bytes:
            self.bytes, self.phase = peak, self.running[-1] if self.running else "other"
        if self._on_look is not None:
            self._on_look()

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


class History:
    """What is allocated over a step, from when this is made: as the allocator has it, at the GPU's times.

    The host allocates ahead of the GPU. At each ``mark`` both clocks are known.
    """

    def __init__(self) -> None:
        self._held = torch.cuda.memory_allocated()
        self._marks: list[tuple[int, Any]] = []
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((time.time_ns() // 1000, event))

    def curve(self) -> list[tuple[float, int]]:
        """Seconds since it began, and bytes; ends the recording. The GPU has nothing to do when this is called."""
        self.mark()
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        torch.cuda.memory._record_memory_history(None)
        begin, first = self._marks[0]
        moments = [(begin, self._held), *allocated(trace, self._held)]
        hosts = [host for host, _ in self._marks]
        seconds = [first.elapsed_time(event) / 1000 for _, event in self._marks]
        times = numpy.interp([time for time, _ in moments], hosts, seconds).tolist()
        sizes = [size for _, size in moments]
        return [*thinned(list(zip(times, sizes, strict=True)), bytes_of=int), (seconds[-1], sizes[-1])]


def allocated(trace: Iterable[Mapping[str, Any]], held: int) -> Iterator[tuple[int, int]]:
    """Of the allocator's events: their microseconds, and bytes after each, of ``held`` at first."""
    for event in trace:
        if sign := {"alloc": 1, "free_requested": -1}.get(event["action"], 0):
            held += sign * -(-event["size"] // BLOCK) * BLOCK
            yield event["time_us"], held


@functools.cache
def _generator() -> torch.Generator:
    """The same on ranks that share a sequence; Megatron seeds torch's alike on all."""
    from megatron.core import parallel_state

    return torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())


def _random_batch(shapes: look.Shapes) -> dict[str, Tensor]:
    """Tokens, by which experts are chosen, are spread over the vocabulary, others on each data-parallel rank."""
    from megatron.training import get_args

    made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    for name in ("tokens", "labels"):
        made[name].random_(get_args().padded_vocab_size, generator=_generator())
    made["position_ids"].copy_(torch.arange(made["position_ids"].shape[1]))
    made["loss_mask"].fill_(1)
    return made


def watch_training(record: str, with_history: bool) -> None:
    """Have Megatron's trainer take these steps, write what they took and end. After ``runner.prepare``."""
    import megatron.training.arguments as arguments
    import megatron.training.training as training

    import megatron_tiling.trainer.install as trainer
    from megatron_tiling.trainer.phases import module_kinds, phase_of

    histories: list[History] = []

    def mark() -> None:
        for history in histories:
            history.mark()

    watch = Watch(on_look=mark)
    for owner, kind in module_kinds().items():
        watch.module_calls(owner, kind)
    stock_validate, stock_step = arguments.validate_args, training.train_step
    stock_data = training.build_train_valid_test_data_iterators
    random_data = look.data_iterators(_random_batch)
    seconds: list[float] = []

    def write(found: dict[str, Any]) -> None:
        Path(f"{record}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))

    @contextmanager
    def recording_its_end(args: Any, building: bool = False) -> Iterator[None]:
        """In the place of what asks the planner for advice, which the user has asked already."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            write({OUT_OF_MEMORY: "building the model and its optimizer" if building else phase_of(error)})
            raise

    @functools.wraps(stock_validate)
    def validate(args: Namespace, *more: Any, **options: Any) -> Any:
        look.leave_out_writing(args)
        validated = stock_validate(args, *more, **options)
        args.save = args.load = args.pretrained_checkpoint = None
        return validated

    @functools.wraps(stock_data)
    def data_iterators(*args: Any, **kwargs: Any) -> Any:
        training.get_args().train_iters = STEPS  # the schedule of learning rates is the user's
        return random_data()

    @functools.wraps(stock_step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(stock_step).bind(*args, **kwargs).arguments
        if not seconds:
            optimizer, config = call["optimizer"], call["config"]
            optimizer.step = watch.during("optimizer step", optimizer.step)
            config.finalize_model_grads_func = watch.during("gradient reduction", config.finalize_model_grads_func)
        watch.on = len(seconds) == STEPS - 1
        beside = symmetric_bytes()  # torch's allocator does not count it, and plans do
        before = torch.cuda.max_memory_allocated() + beside, torch.cuda.memory_allocated() + beside
        if watch.on:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        if watch.on and with_history:
            histories.append(History())
        began = time.perf_counter()
        result = stock_step(*args, **kwargs)
        watch.end("")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if not watch.on:
            return result
        watch.on = False
        free, total = torch.cuda.mem_get_info()
        write({
            "peak": torch.cuda.max_memory_allocated() + beside, "phase": watch.phase, "earlier peak": before[0],
            "held": before[1], "reserved": torch.cuda.max_memory_reserved() + beside,
            "outside": total - free - torch.cuda.memory_reserved() - beside, "seconds": seconds,
            "loss": {name: float(value) for name, value in result[0].items()},
            "history": histories[0].curve() if histories else [],
        })  # fmt: skip
        torch.distributed.barrier()  # nobody leaves while others wait for it
        raise SystemExit(0)

    trainer.saying_what_fits = recording_its_end
    trainer.replace_in_all_modules({
        id(stock_validate): validate, id(stock_data): data_iterators, id(stock_step): train_step,
    })  # fmt: skip


def main() -> None:
    """Run the script that ``sys.argv`` names."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--history", action="store_true", help="with all that is allocated and freed in the last step")
    parser.add_argument("record")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.argv = [options.script, *options.arguments]
    runner.prepare(options.script)
    watch_training(options.record, options.history)
    runner.run(options.script)


if __name__ == "__main__":
    main()

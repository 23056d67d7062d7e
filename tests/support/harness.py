"""What tests, and the scripts under torchrun, share: Megatron's groups, all pairs of options, counters."""

import collections
import gc
import itertools
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.nn  # before there is a group, which defaults of its functions would keep
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMMS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


@contextmanager
def megatron(**parallel_sizes: int) -> Iterator[None]:
    """Megatron's process groups over gloo, on CPU tensors, for as long as the context lasts."""
    from megatron_tiling import cpu

    cpu.install(train=False)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**parallel_sizes)
    model_parallel_cuda_manual_seed(11)
    yield
    leave()  # not after an error: the other ranks may wait elsewhere, until torchrun ends them


@contextmanager
def world_of_one(backend: str) -> Iterator[None]:
    """Megatron's process groups of this process alone, unless it has some."""
    from megatron.core import parallel_state

    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    yield
    if started:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def load_deepspeed() -> None:
    """Before there is a group, which defaults of DeepSpeed's functions would keep: trainers load it when they like."""
    from megatron_tiling import cpu
    from megatron_tiling.zero3.engine import import_deepspeed

    cpu.install(train=False)
    import_deepspeed()


def leave() -> None:
    """End all process groups, on all ranks together: gloo may abort in a rank whose peer has left.

    Raises:
        AssertionError: something still holds gloo's default group: its threads would run while Python ends, and abort.
    """
    has_threads = torch.distributed.get_backend() == "gloo"
    world = weakref.ref(torch.distributed.group.WORLD)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()
    assert not has_threads or world() is None, gc.get_referrers(world())


@contextmanager
def naming(case: object) -> Iterator[None]:
    """What fails within says on which case."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages of numbers that operations return, for as long as they live.

    Integers are left out: pickled messages are bytes that live until a thread of gloo lets them go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = {
            held.untyped_storage()._cdata for held in gc.get_objects() if issubclass(type(held), torch.Tensor)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that floating-point tensors made within ``work()`` hold at once, in this thread."""
    gc.collect()
    with _LiveBytes() as bytes_:
        work()
    return bytes_.peak


class Counter(TorchDispatchMode):
    """Counts GEMMs and collectives, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.counts[name] += 1
        elif name in GEMMS:
            self.counts["gemm"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gemms(self) -> int:
        return self.counts["gemm"]

    @property
    def collectives(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name != "gemm"}


def all_pairs(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few settings that together hold every pair of values of every two options (greedy, deterministic)."""
    rng = random.Random(seed)
    names = list(options)

    def pairs_of(case: Mapping[str, Any]) -> set[Any]:
        return {((a, repr(case[a])), (b, repr(case[b]))) for a, b in itertools.combinations(names, 2)}

    missing = set()
    for a, b in itertools.combinations(names, 2):
        missing |= {((a, repr(x)), (b, repr(y))) for x in options[a] for y in options[b]}
    cases = []
    while missing:
        candidates = [{name: rng.choice(options[name]) for name in names} for _ in range(60)]
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected values; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)

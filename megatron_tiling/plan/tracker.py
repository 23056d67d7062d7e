"""Live bytes of every storage that operations make, what made them, and the peak with its parts and its phase.

A ``TorchDispatchMode`` of its own rather than torch's ``MemTracker``, whose module hooks and backward hooks would make
tiled layers run stock code, and which knows no phases. Nothing is hooked here: module calls are wrapped at the class,
and a backward operation belongs to the module whose forward made its autograd node, found by the node's number.

Works on fake and on real tensors alike, of any device: each storage counts as on a GPU, in whole blocks of its caching
allocator. Hazards: what a kernel allocates inside an operation does not show; tensors made before the mode is entered
count from the first operation that returns them, and not at all if none does.
"""

from __future__ import annotations

import bisect
import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

#: Bytes: the caching allocator's kMinBlockSize (c10/cuda/CUDACachingAllocator.cpp), to multiples of which it rounds.
BLOCK = 512
HOST = "host"
#: Kinds of modules that other modules in them, which have names elsewhere, are a part of.
WHOLE = {"experts"}

#: Who holds a gradient that autograd's engine alone has, as ``__torch_dispatch__`` finds it: references to the tensor,
#: to its storage, and to the Python object (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace).
_AUTOGRAD_ALONE = (4, 2, 3)
_storage_holders = torch._C._storage_Use_Count

#: Is told an operation, its arguments, its keywords and its result.
OnOperation = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], object]


@dataclass(frozen=True, eq=False)
class Phase:
    """One call of a module, or one part of a step.

    Args:
        kind: what runs: "attention", "MLP", "optimizer step", ...
        backward: in the backward pass; forward passes that recompute there are forward phases.
    """

    kind: str
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, backward" if self.backward else self.kind


@dataclass(eq=False, slots=True)
class Allocation:
    """A storage: its bytes on a GPU, when it was there (``died`` is ``None``: still), and what made it.

    Args:
        category: as ``Tracker.mark`` says; ``None`` is what it is by its phase.
    """

    bytes: int
    born: int
    phase: Phase
    died: int | None = None
    category: str | None = None

    def lives(self, time: int) -> bool:
        return self.born <= time and (self.died is None or time < self.died)

    def part(self, at: Phase) -> str:
        """The part of memory that it is while ``at`` runs."""
        if self.category is not None:
            return self.category
        kept = self.phase is not at and not self.phase.backward
        return f"{'kept activations' if kept else 'transients'}: {self.phase.kind}"


@dataclass(frozen=True)
class Peak:
    """Bytes that were live at once, the most of all or a moment's: when, and in which phase."""

    bytes: int
    time: int
    phase: Phase


class Tracker(TorchDispatchMode):
    """Counts what is made while the mode is on. ``peak`` is since ``reset_peak``.

    Args:
        kinds: what calls of modules of a class are called; others go by their caller's name.
        on_operation: is told of operations that are kernels of their own.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around every operation; nothing is compiled here

    def __init__(self, kinds: Mapping[Any, str] | None = None, on_operation: OnOperation | None = None) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        self.bytes = 0
        self.kinds = dict(kinds or {})
        self.on_moment: Callable[[Peak], None] | None = None  # is told of all that might be a peak
        self._replaced = ExitStack()
        self._on_operation = on_operation
        self._live: dict[int, Allocation] = {}
        self._time = 0
        self._fused = 0
        self.running = self._base = Phase("other")
        self._node: int | None = None  # number of the autograd node that runs
        self._numbers, self._phases = [0], [self._base]  # nodes of this number and on were made in this phase
        self._backward_of: dict[Phase, Phase] = {}
        self.reset_peak()

    # Phases

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """A part of a step, by name: what runs in it outside of modules that have names."""
        before, base = self.running, self._base
        self._base = Phase(kind)
        self._enter(self._base)
        try:
            yield
        finally:
            self._base = base
            self._enter(before)

    @contextmanager
    def fused(self) -> Iterator[None]:
        """A part that is one kernel on a GPU: what dies in it was never made there."""
        self._fused += 1
        try:
            yield
        finally:
            self._fused -= 1
            self._see()

    def _enter(self, phase: Phase) -> None:
        self.running = phase
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers[-1] == number:
            self._phases[-1] = phase
        elif number > self._numbers[-1]:
            self._numbers.append(number)
            self._phases.append(phase)

    def _follow_backward(self) -> None:
        node: Any = torch._C._current_autograd_node()  # not kept: it holds the graph
        number = None if node is None else node._sequence_nr()
        if number == self._node or (number is not None and number >= 2**63):  # that one accumulates a gradient
            return
        self._node = number
        if number is None:
            self._enter(self._base)
            return
        made_in = self._phases[bisect.bisect_right(self._numbers, number) - 1]
        self._enter(made_in)  # whose nodes are made again, if it recomputes
        self.running = self._backward_of.setdefault(made_in, Phase(made_in.kind, backward=True))

    # Storages

    def __enter__(self) -> Self:
        stock_resize = torch.UntypedStorage.resize_

        @functools.wraps(stock_resize)
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = stock_resize(storage, size)
            if storage._cdata in self._live:
                self._free(storage._cdata)
                self._allocate(storage)
                self._see()
            return result

        self._replace(torch.UntypedStorage, "resize_", resize)
        for owner, kind in self.kinds.items():
            self._replace(owner, "__call__", self._named(kind, owner.__call__))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._replaced.close()

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        if name in vars(owner):
            self._replaced.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._replaced.callback(delattr, owner, name)
        setattr(owner, name, new)

    def _named(self, kind: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Calls of modules as a phase. Of these alone: the head looks at who calls the output layer."""

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.running
            if before.kind in WHOLE:
                return stock(*args, **kwargs)
            self._enter(Phase(kind))
            try:
                return stock(*args, **kwargs)
            finally:
                self._enter(before)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # every other of the calls
        kwargs = kwargs or {}
        self._follow_backward()
        if func is torch.ops.aten.add.Tensor and self._node is not None:
            holders = args[0]._use_count(), _storage_holders(args[0].untyped_storage()._cdata), sys.getrefcount(args[0])
            if holders == _AUTOGRAD_ALONE and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
                return args[0]  # a sum of gradients, which autograd makes in place unless a mode is on
        result = run(func, args, kwargs)
        for value in tree_iter(result):
            is_strided = type(value) in (Tensor, FakeTensor, torch.nn.Parameter) and value.layout is torch.strided
            if is_strided and value.device.type != "meta":
                self._add(value.untyped_storage())
        if self._on_operation is not None and not self._fused:
            self._on_operation(func, args, kwargs, result)
        self._see()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._allocate(storage)
        weakref.finalize(storage, self._free, key).atexit = False

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        self._time += 1
        allocation = Allocation(-(-storage.nbytes() // BLOCK) * BLOCK, self._time, self.running)
        self._live[storage._cdata] = allocation
        self.allocations.append(allocation)
        self.bytes += allocation.bytes

    def _free(self, key: int) -> None:
        self._time += 1
        allocation = self._live.pop(key)
        allocation.died = self._time
        self.bytes -= allocation.bytes

    # What is asked

    def mark(self, category: str, tensors: Iterable[Any]) -> None:
        """Say what the storages of tensors are, unless it was said before."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                allocation = self._live.get(tensor.untyped_storage()._cdata)
                if allocation is not None and allocation.category is None:
                    allocation.category = category

    def mark_live(self, category: str, built: str) -> None:
        """Say what all that a phase has left is, unless it was said before."""
        for allocation in self._live.values():
            if allocation.category is None and allocation.phase.kind == built:
                allocation.category = category

    def keep_on_host(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are in the host's memory, not the GPU's."""
        for tensor in tensors:
            allocation = self._live[tensor.untyped_storage()._cdata]
            self.bytes -= allocation.bytes
            allocation.bytes, allocation.category = 0, HOST

    def is_on_host(self, tensor: Tensor) -> bool:
        allocation = self._live.get(tensor.untyped_storage()._cdata)
        return allocation is not None and allocation.category == HOST

    def reset_peak(self) -> None:
        self.peak = Peak(self.bytes, self._time, self.running)

    def _see(self) -> None:
        if self._fused:
            return
        if self.bytes > self.peak.bytes:
            self.peak = Peak(self.bytes, self._time, self.running)
        if self.on_moment is not None:
            self.on_moment(Peak(self.bytes, self._time, self.running))

    def parts(self, moment: Peak | None = None, among: Iterable[Allocation] | None = None) -> dict[str, int]:
        """Bytes of each part of memory at the peak, or at another moment, the largest first.

        Args:
            among: all that lives then, and maybe more.
        """
        moment = moment or self.peak
        found: Counter[str] = Counter()
        for allocation in self.allocations if among is None else among:
            if allocation.lives(moment.time):
                found[allocation.part(moment.phase)] += allocation.bytes
        return {part: size for part, size in found.most_common() if size}


#: Values that fake tensors are read as. A gradient norm of 1 and no overflow: the optimizer steps.
_READ_AS: dict[type, float] = {bool: False, int: 1, float: 1.0}

#: Operations of which nearly all of a step are, and whose results depend on shapes alone. FakeTensorMode looks each
#: up in a cache at 0.1 ms; their kernels of the meta device, which it would run, take a tenth of that.
_SIMPLE = frozenset(
    "_fused_rms_norm _unsafe_view add add_ addmm addmm_ alias as_strided baddbmm bmm cat clone copy_ detach div div_ "
    "empty_like expand fill_ mm mul mul_ narrow neg new_empty permute select sigmoid slice split split_with_sizes "
    "squeeze sub sum t transpose unsqueeze view zero_".split()
)


def _mode_of_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FakeTensorMode | None:
    """Of the fake tensors that an operation takes, if all are on one device and none has a value."""
    mode = device = None
    for value in (*args, *kwargs.values()):
        for tensor in value if type(value) is list else (value,):
            if isinstance(tensor, FakeTensor):
                if tensor.constant is not None or (device is not None and device != tensor.fake_device):
                    return None
                mode, device = tensor.fake_mode, tensor.fake_device
            elif isinstance(tensor, (Tensor, torch.device)):
                return None
    return mode


def _run_simple(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0][0] if type(args[0]) is list else args[0]
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)

    def fake(tensor: Any) -> Any:
        return FakeTensor(mode, tensor, first.fake_device) if type(tensor) is Tensor else tensor

    return type(result)(map(fake, result)) if isinstance(result, (list, tuple)) else fake(result)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, on fake tensors also where fake tensors have no answer: values, and products of a GPU alone."""
    if func._overloadname == "dtype_out" and isinstance(kwargs["out"], FakeTensor):
        return kwargs["out"]
    is_simple = func._opname in _SIMPLE and not func._overloadname.startswith("dtype")
    if is_simple and (mode := _mode_of_all(args, kwargs)) is not None:
        if func._opname.endswith("_"):
            return args[0]
        if "out" in kwargs and kwargs["out"].numel():  # an empty one is resized
            return kwargs["out"]
        return _run_simple(mode, func, args, kwargs)
    if func.namespace == "c10d" and any(isinstance(value, FakeTensor) for value in tree_iter(args[0])):
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work  # what they write is their first argument
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        if func is not torch.ops.aten._local_scalar_dense.default:
            raise
        dtype = args[0].dtype
        return _READ_AS[bool if dtype is torch.bool else float if dtype.is_floating_point else int]

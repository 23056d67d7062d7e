"""The tracker: sizes, lifetimes, parts and phases of a small network, on real and on fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatron_tiling.plan.tracker import Tracker

KIB = 1024


@pytest.fixture(params=["real", "fake"])
def mode(request: pytest.FixtureRequest) -> Iterator[Any]:
    with nullcontext() if request.param == "real" else FakeTensorMode():
        yield request.param


class Square(torch.nn.Module):
    """Makes two tensors of its input's size, and keeps its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * x) + 1


class Attention(Square): ...


class MLP(Square): ...


KINDS = {Attention: "attention", MLP: "MLP"}


def test_bytes_are_rounded_and_end_with_the_storage(mode: str) -> None:
    with Tracker() as tracker:
        x = torch.empty(1000, dtype=torch.uint8)
        view = x[10:]
        y = torch.empty(512, dtype=torch.uint8)
        assert tracker.bytes == 1024 + 512
        del x
        assert tracker.bytes == 1024 + 512
        del view, y
        assert tracker.bytes == 0
    assert tracker.peak.bytes == 1024 + 512


def test_in_place_and_out_make_nothing(mode: str) -> None:
    with Tracker() as tracker:
        x, out = torch.ones(8, 64), torch.empty(8, 64)
        before = tracker.bytes
        x += 1
        torch.mul(x, 2, out=out)
        out[:4].copy_(x[:4])
        assert tracker.bytes == before == 2 * 2 * KIB
    assert tracker.peak.bytes == before


def test_a_storage_that_is_resized(mode: str) -> None:
    with Tracker() as tracker:
        x = torch.empty(KIB, dtype=torch.uint8)
        x.untyped_storage().resize_(0)
        assert tracker.bytes == 0
        x.untyped_storage().resize_(4 * KIB)
        assert tracker.bytes == 4 * KIB
        del x
        assert tracker.bytes == 0


def test_parts_and_phase_of_the_peak(mode: str) -> None:
    first, second = Attention(), MLP()
    with Tracker(KINDS) as tracker:
        weight = torch.ones(KIB, requires_grad=True)
        tracker.mark("weights", [weight])
        x = first(weight)
        x = second(x)
        loss = x.sum()
        assert tracker.peak.phase.kind == "MLP"
        tracker.reset_peak()
        with tracker.phase("backward"):
            loss.backward()
    # the loss, its gradient (of one element, expanded), x and the result, and the first gradient's two terms
    assert str(tracker.peak.phase) in ("MLP, backward", "attention, backward")
    parts = tracker.parts()
    assert parts["weights"] == 4 * KIB
    assert parts["kept activations: attention"] == 4 * KIB
    assert sum(parts.values()) == tracker.peak.bytes


def test_recomputed_modules_have_their_own_phase(mode: str) -> None:
    first, second = Attention(), MLP()
    seen = []
    with Tracker(KINDS, on_operation=lambda *op: seen.append(str(tracker.running))) as tracker:
        weight = torch.ones(KIB, requires_grad=True)
        loss = second(checkpoint(first, weight, use_reentrant=True)).sum()
        seen.clear()
        loss.backward()
    order = list(dict.fromkeys(phase for phase in seen if not phase.startswith("other")))
    assert order == ["MLP, backward", "attention", "attention, backward"]


def test_what_dies_in_a_fused_part_was_never_made(mode: str) -> None:
    with Tracker() as tracker:
        x = torch.ones(KIB)
        with tracker.fused():
            y = (x * x + 1) * 2
        assert y.shape == x.shape
    assert tracker.peak.bytes == 2 * 4 * KIB


def test_operations(mode: str) -> None:
    seen: list[str] = []
    with Tracker(on_operation=lambda func, *op: seen.append(func._opname)) as tracker, tracker.phase("step"):
        x = torch.ones(16, 16)
        x @ x
    assert tracker.parts() == {"transients: step": 2 * KIB}
    assert seen == ["ones", "mm"]


def test_values_of_fake_tensors_and_products_into_wider_ones() -> None:
    with FakeTensorMode(), Tracker() as tracker:
        assert torch.ones(1).item() == 1.0
        assert not torch.ones(1, dtype=torch.bool).item()
        a, out = torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4, 4)
        held = tracker.bytes
        torch.addmm(out, a, a, out=out, out_dtype=torch.float32)
        assert tracker.bytes == held


def backward_of(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of Python's whose gradient ``make`` makes."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> torch.Tensor:
            return make(grads[0])

    apply: Any = Function.apply
    return lambda x: apply(x)


class SumsOfGradients(Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.add.Tensor and torch._C._current_autograd_node() is not None:
            self.found.append("aten::add_" if result is args[0] else "aten::add")
        return result


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        backward_of(lambda grad: grad),
        backward_of(torch.empty_like),
        backward_of(lambda grad: torch.empty(grad.numel()).view(grad.shape)),
    ],
    ids=["none", "same", "new", "view"],
)
@pytest.mark.parametrize(
    "branches",
    [
        lambda f, y: f(y + y.exp()),
        lambda f, y: f(y) + y.exp(),
        lambda f, y: y.exp() + f(y),
        lambda f, y: f(y) + f(y),
    ],
    ids=["residual", "first", "second", "both"],
)
def test_sums_of_gradients_are_in_place_where_they_are_without_a_tracker(
    mode: str, function: Any, branches: Any
) -> None:
    def loss() -> torch.Tensor:
        y = torch.zeros(8, 64, requires_grad=True) * 1
        return (branches(function, y) * 2).exp().sum()

    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        stock = loss()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            stock.backward()
    with SumsOfGradients() as tracker:
        of_tracker = loss()
        tracker.found.clear()
        of_tracker.backward()
    assert tracker.found == [event.name for event in profiler.events() if event.name in ("aten::add", "aten::add_")]

"""What is made again in the backward pass is made once, and its source is checked as autograd checks saved tensors."""

import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tiling.tiles.remade import made_again


def test_views_of_it_are_made_again_once() -> None:
    calls = []

    def twice(source: Tensor) -> Tensor:
        calls.append(source)
        return torch.cat([source, source])

    source, weight = torch.randn(2, 3), torch.ones(3, requires_grad=True)
    made = twice(source)
    with made_again(made, twice, source):
        outputs = made * weight, made[1:3] * weight, made.t()[:2].t() * weight[:2]
    made.zero_()
    for passes in (2, 3):  # the second one with retain_graph
        (gradient,) = torch.autograd.grad(sum(output.sum() for output in outputs), weight, retain_graph=True)
        torch.testing.assert_close(gradient, twice(source).sum(0) * torch.tensor([2, 2, 1]) + source.sum(0))
        assert calls.pop() is not None and len(calls) == passes


def test_nothing_else_keeps_it() -> None:
    source, weight = torch.randn(2, 3), torch.ones(3, requires_grad=True)
    made = source * 2
    with made_again(made, lambda source: source * 2, source):
        output = made * weight
    left = weakref.ref(made)
    del made
    assert left() is None and output.requires_grad


def test_a_source_that_was_changed_in_place_is_refused() -> None:
    source, made = torch.ones(2, 3), torch.ones(4, 3)
    weight = torch.ones(3, requires_grad=True)
    with made_again(made, lambda source: source.repeat(2, 1), source):
        output = made * weight
    source.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_tensors_without_memory_are_told_apart() -> None:
    def again(source: Tensor) -> Tensor:
        raise AssertionError("what was saved is another tensor")

    with FakeTensorMode():
        source, other, weight = torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, requires_grad=True)
        made = source * 2
        with made_again(made, again, source):
            output = other * weight
        output.sum().backward()


def test_inference_mode_keeps_nothing_and_counts_no_versions() -> None:
    with torch.inference_mode():
        source = torch.randn(2, 3)
        made = source * 2
        with made_again(made, lambda source: source * 2, source):
            output = made + 1
    torch.testing.assert_close(output, source * 2 + 1)

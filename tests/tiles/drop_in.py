"""The same script, seed and inputs on DeepSpeed's TiledLinear and on ours.

A case is a function of a library (DeepSpeed's module or ours) and a grid. Where DeepSpeed's class raises, so must ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed.runtime.zero.tiling as theirs
import torch
from torch import Tensor, nn

import megatron_tiling.tiling as ours

Grid = tuple[int, int]
Case = Callable[[Any, Grid], Any]
GRIDS = [(1, 1), (1, 3), (2, 1), (2, 3)]


def check(case: Case, *, refused: bool = False, grids: Sequence[Grid] = GRIDS) -> None:
    """Ours does as theirs on every grid; ``refused``: theirs raises on one of them at least."""
    results = [(_outcome(case, ours, grid), _outcome(case, theirs, grid)) for grid in grids]
    errors = [expected for _, expected in results if isinstance(expected, Exception)]
    assert bool(errors) == refused, errors
    for actual, expected in results:
        assert_same(actual, expected)


def _outcome(case: Case, lib: Any, grid: Grid) -> Any:
    try:
        return case(lib, grid)
    except Exception as error:
        return error


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), actual
        return
    assert type(actual) is type(expected), (actual, expected)
    if isinstance(expected, Tensor):
        assert (actual.requires_grad, actual.device) == (expected.requires_grad, expected.device)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_same(list(actual.values()), list(expected.values()))
    else:
        assert actual == expected


def make(lib: Any, grid: Grid, cls: str = "TiledLinear", **options: Any) -> Any:
    return made(getattr(lib, cls), grid, **options)


def made(cls: Any, grid: Grid, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(16, 12, in_splits=grid[0], out_splits=grid[1], **options)


def input_of(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (4, 16)), generator=torch.Generator().manual_seed(1), **options)


def trained(layer: nn.Module, given: Any = None, upstream: Any = None, call: Any = None) -> list[Any]:
    """Output and gradients of one step."""
    given = input_of(requires_grad=True) if given is None else given
    output = (call or layer)(given)
    outputs = [part for part in tensors_in(output) if part.requires_grad]
    grads = [torch.linspace(-1, 1, part.numel()).to(part.dtype).view_as(part) for part in outputs]
    torch.autograd.backward(outputs, [upstream(grad) for grad in grads] if upstream else grads)
    results = [output, given.grad, [parameter.grad for parameter in layer.parameters()]]
    layer.zero_grad()
    return results


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (list, tuple)) else []


class Activated(nn.Linear):
    """A tile whose output autograd keeps."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).exp()


class Returns(nn.Module):
    """A tile that returns its input's first features (a view), or its parameter."""

    def __init__(self, i: int, o: int, bias: bool = True, what: str = "view") -> None:
        super().__init__()
        self.weight, self.o, self.what = nn.Parameter(torch.randn(4, o)), o, what

    def forward(self, x: Tensor) -> Any:
        return x[:, : self.o] if self.what == "view" else self.weight

"""Loops give numbers whatever was in the memory that they are given, also beyond the rows that they use."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
from megatron_tiling.tiles.mlp import MLPLoop, tiled_mlp


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss(dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((12, 2, 32), (44, 32)))
    loss = tiled_linear_cross_entropy(hidden, weight, torch.randint(0, 44, (12, 2)), HeadLoop()).loss
    assert all(tensor.isfinite().all() for tensor in (loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mlp(dtype: torch.dtype, keep: int) -> None:
    shapes = ((24, 32), (2 * 44, 32), (32, 44))
    hidden, fc1, fc2 = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes)

    def swiglu(pre: torch.Tensor, bias: None, scale: None) -> torch.Tensor:
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up

    loop = MLPLoop([0, 15, 30, 44], Activation(True, swiglu), keep)
    output = tiled_mlp(hidden, fc1, None, fc2, None, loop)
    grads = torch.autograd.grad(output.sum(), (hidden, fc1, fc2))
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def test_flops_are_counted_as_of_a_dense_layer() -> None:
    counts = []
    for grid in (None, TileGrid(24, 20, 3, 2)):
        x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(20, 24, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            output = x @ weight.t() if grid is None else tiled_linear(x, weight, None, TileLoop(grid))
            output.backward(torch.ones(4, 20))  # type: ignore[union-attr]
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 4 * 20 * 24

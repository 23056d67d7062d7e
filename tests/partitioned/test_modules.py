"""The tiles as modules take upstream gradients of any layout, in float64 against torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_tiling.partitioned.modules import MLPTile, WeightTile
from megatron_tiling.tiles.activation import Activation

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda grad: grad,
    "expanded": lambda grad: grad[:1, :1].expand_as(grad),
    "transposed": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda grad: torch.stack([grad, torch.full_like(grad, 99)], dim=-1)[..., 0],
    "offset": lambda grad: torch.cat([torch.full_like(grad, 99), grad])[len(grad) :],
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def swiglu(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    gate, up = (pre if bias is None else pre + bias).chunk(2, -1)
    out = F.silu(gate) * up
    return out if scale is None else out * scale.unsqueeze(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_tile(layout: str) -> None:
    x, tile = draw(5, 2, 6), WeightTile(Parameter(draw(7, 6).detach()))
    upstream = LAYOUTS[layout](torch.randn(5, 2, 7, dtype=torch.float64))
    found = torch.autograd.grad(tile(x)[0], (x, tile.weight), upstream)
    expected = torch.autograd.grad(F.linear(x, tile.weight), (x, tile.weight), upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlp_tile(layout: str, keep: bool) -> None:
    """With a bias, and a scale that has a stride."""
    x, unit = draw(5, 2, 6), MLPTile(Parameter(draw(8, 6).detach()), Parameter(draw(7, 4).detach()))
    bias, scales = draw(2, 4), draw(10, 3)
    upstream = LAYOUTS[layout](torch.randn(5, 2, 7, dtype=torch.float64))
    activation, leaves = Activation(True, swiglu), (x, unit.fc1, unit.fc2, bias, scales)
    output = unit(x, activation=activation, bias=bias, scale=scales[:, 1], keep=keep)
    found = torch.autograd.grad(output, leaves, upstream)
    between = swiglu(F.linear(x, unit.fc1).flatten(0, 1), bias.flatten(), scales[:, 1])
    exact = F.linear(between, unit.fc2).view(5, 2, 7)
    torch.testing.assert_close(output, exact)
    torch.testing.assert_close(found, torch.autograd.grad(exact, leaves, upstream))

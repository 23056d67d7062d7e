"""Second derivatives are refused wherever tiles are a part of the graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
from megatron_tiling.tiles.mlp import MLPLoop, tiled_mlp

W = torch.linspace(-1, 1, 8 * 4).view(8, 4)
GELU = Activation(False, lambda pre, bias, scale: torch.nn.functional.gelu(pre))
TILED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: tiled_linear(x, W, None, TileLoop(TileGrid(4, 8, 1, 2))),  # type: ignore[dict-item]
    "mlp": lambda x: tiled_mlp(x, W, None, W.t().contiguous(), None, MLPLoop((0, 4, 8), GELU, keep=1)),
    "head": lambda x: tiled_linear_cross_entropy(x, W, torch.tensor([1, 2, 7]), HeadLoop()).loss,
}


@pytest.mark.parametrize("name", TILED)
def test_second_derivatives_are_refused(name: str) -> None:
    """Also where the upstream gradient is a constant, and other terms have second derivatives."""
    x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    output = TILED[name](x).sum() + x.pow(3).sum()
    torch.autograd.grad(output, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        torch.autograd.grad(output, x, create_graph=True)

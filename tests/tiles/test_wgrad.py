"""What a fused weight gradient leaves for autograd: a placeholder that holds no memory and cannot be misread."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.linear import TileLoop, tiled_linear

FUSED = TileLoop(TileGrid(8, 12, 2, 3), fuse_wgrad=True)


@pytest.fixture
def weight() -> Tensor:
    """A parameter as Megatron's DDP leaves it."""
    weight: Any = torch.nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad = False
    return weight


def fused(x: Tensor, weight: Tensor) -> Tensor:
    output = tiled_linear(x, weight, None, FUSED)
    assert isinstance(output, Tensor)
    return output


def test_it_holds_no_memory_and_main_grad_has_the_gradient(weight: Any) -> None:
    x, dy = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    (fused(x, weight) + fused(2 * x, weight)).backward(dy)
    assert weight.grad.shape == weight.shape
    with pytest.raises(RuntimeError, match="invalid python storage"):
        weight.grad.untyped_storage().data_ptr()
    torch.testing.assert_close(weight.main_grad, 3 * dy.t() @ x)
    assert weight.grad_added_to_main_grad


def test_another_use_of_the_weight_keeps_its_gradient(weight: Any) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    (fused(x, weight) + x @ weight.t()).sum().backward()
    torch.testing.assert_close(weight.grad, weight.main_grad)


def test_reading_it_is_an_error(weight: Any) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    fused(x, weight).sum().backward()
    with pytest.raises(RuntimeError, match="main_grad"):
        weight.grad.norm()
    with pytest.raises(RuntimeError, match="main_grad"):  # it would be lost in the placeholder
        (x @ weight.t()).sum().backward()


def test_shared_weights_get_zeros(weight: Any) -> None:
    weight.zero_out_wgrad = True
    fused(torch.randn(5, 8, dtype=torch.float64), weight).sum().backward()
    assert type(weight.grad) is Tensor and not weight.grad.any()


def test_anomaly_detection_reads_zeros(weight: Any) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.autograd.set_detect_anomaly(True):
        (fused(x, weight).sum() + x.sum() * weight.sum()).backward()
    torch.testing.assert_close(weight.main_grad, x.sum(0).expand(12, 8))
    torch.testing.assert_close(weight.grad, x.sum().expand(12, 8))

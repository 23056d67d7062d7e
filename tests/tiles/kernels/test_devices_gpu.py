"""Kernels run on the device of their tensors, whichever is current."""

import pytest
import torch
import torch.nn.functional as F

from megatron_tiling.tiles.activation import Activation, Formula
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.mlp import MLPLoop, tiled_mlp

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def results(device: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(f"cuda:{device}").requires_grad_()

    hidden, fc1, fc2, vocabulary = draw(48, 32), draw(2 * 64, 32), draw(32, 64), draw(96, 32)

    def swiglu(pre: torch.Tensor, bias: None, scale: None) -> torch.Tensor:
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up

    loop = MLPLoop((0, 32, 64), Activation(True, swiglu, Formula("silu")), keep=1)
    output = tiled_mlp(hidden, fc1, None, fc2, None, loop)
    labels = torch.arange(48, device=f"cuda:{device}")
    loss = tiled_linear_cross_entropy(output, vocabulary, labels, HeadLoop()).loss
    grads = torch.autograd.grad(loss.sum(), (hidden, fc1, fc2, vocabulary))
    return [tensor.detach().cpu() for tensor in (loss, *grads)]


def test_another_device_than_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    for here, there in zip(results(0), results(1), strict=True):
        torch.testing.assert_close(there, here)

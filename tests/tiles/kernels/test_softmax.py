"""The kernels on logits are given operands of any layout, and compute what the torch form does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling.tiles import head, softmax
from megatron_tiling.tiles.head import CrossEntropyLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.softmax import Statistics

kernels = pytest.importorskip("megatron_tiling.tiles.kernels.softmax")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, COLUMNS = 6, 37


def expanded(vector: Tensor) -> Tensor:
    return vector[:1].expand(len(vector))


def strided(vector: Tensor) -> Tensor:
    return torch.stack([vector, torch.full_like(vector, 99)], dim=1)[:, 0]


def offset(vector: Tensor) -> Tensor:
    return torch.cat([torch.full_like(vector, 99), vector])[len(vector) :]


def transposed(vector: Tensor) -> Tensor:
    return vector.view(2, -1).t().contiguous().t().reshape(-1)


LAYOUTS = st.sampled_from([expanded, strided, offset, transposed])


def rows(dense: bool = True) -> Tensor:
    wide = torch.randn(TOKENS, COLUMNS + 5, device=DEVICE)[:, 3 : 3 + COLUMNS]
    return wide if dense else wide.t().contiguous().t()


@given(LAYOUTS, LAYOUTS, LAYOUTS)
def test_gradient(labels_as, log_sum_exp_as, grad_as) -> None:
    logits = rows()
    labels = labels_as(torch.randint(0, COLUMNS + 4, (TOKENS,), device=DEVICE))
    log_sum_exp = log_sum_exp_as(logits.logsumexp(1))
    grad = grad_as(torch.rand(TOKENS, device=DEVICE))
    expected = logits.double()
    softmax.logits_to_gradient(expected, 2, labels, log_sum_exp.double(), grad.double(), 0.5)
    kernels.logits_to_gradient(logits, 2, labels, log_sum_exp, grad, 0.5)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


@given(LAYOUTS)
def test_statistics(labels_as) -> None:
    logits, labels = rows(), labels_as(torch.randint(0, COLUMNS, (TOKENS,), device=DEVICE))
    found = []
    for form, dtype in ((kernels, torch.float32), (softmax, torch.float64)):
        statistics = Statistics.of_no_logits(labels, dtype, argmax=True)
        form.update_statistics(logits.to(dtype), 0, labels, 1.0, statistics)
        found.append(vars(statistics).values())
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=1e-5, atol=1e-5)


def test_what_is_written_must_be_dense() -> None:
    vector, labels = torch.zeros(TOKENS, device=DEVICE), torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.update_statistics(rows(), 0, labels, 1.0, Statistics(strided(vector), vector, vector))
    with pytest.raises(ValueError, match="dense rows"):
        kernels.logits_to_gradient(rows(dense=False), 0, labels, vector, vector, 1.0)


@pytest.mark.parametrize("form", [kernels, softmax])
def test_a_first_tile_of_nothing_but_minus_infinity(form) -> None:
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    statistics = Statistics.of_no_logits(labels, torch.float32)
    for tile in (torch.full((1, 3), -math.inf), torch.tensor([[1.0, 2.0]])):
        form.update_statistics(tile.to(DEVICE), 0, labels, 1.0, statistics)
    log_sum_exp = statistics.largest + statistics.sum_exp.log()
    torch.testing.assert_close(log_sum_exp, torch.tensor([1.0, 2.0], device=DEVICE).logsumexp(0)[None])


REDUCTIONS = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "sum / n": lambda losses: losses.sum() / 64,
    "sum of transposed": lambda losses: losses.transpose(0, 1).contiguous().sum(),
    "one token": lambda losses: losses[3, 1],
    "masked": lambda losses: (losses * torch.linspace(0, 1, 64, device=losses.device).view(16, 4)).sum(),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_of_the_losses(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd hands over a gradient of stride 0 for a sum."""
    monkeypatch.setattr(head, "softmax_for", lambda logits: kernels)
    hidden = torch.randn(16, 4, 32, device=DEVICE, requires_grad=True)
    weight = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 64, (16, 4), device=DEVICE)
    reduce = REDUCTIONS[reduction]
    losses = tiled_linear_cross_entropy(hidden, weight, labels, CrossEntropyLoop()).loss
    logits = hidden.double() @ weight.double().t()
    exact = logits.logsumexp(-1) - logits.gather(-1, labels[..., None]).squeeze(-1)
    for ours, right in zip(*(torch.autograd.grad(reduce(of), (hidden, weight)) for of in (losses, exact)), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-4)

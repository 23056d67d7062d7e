"""The kernels on logits are given operands of any layout, and compute what the torch form does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling.tiles import head, softmax
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.scores import scores_of
from megatron_tiling.tiles.softmax import LogitScale, Statistics, TokenGradients
from tests.tiles.plain_scores import plain_scores, problem

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


def chosen(k: int, layout, low: int = 0, high: int = COLUMNS) -> Tensor:
    """``[n, k]``, some of them outside the tile."""
    if k == 0:
        return torch.empty(TOKENS, 0, dtype=torch.int64, device=DEVICE)
    return torch.stack([layout(torch.randint(low, high, (TOKENS,), device=DEVICE)) for _ in range(k)], dim=1)


SCALES = st.builds(
    LogitScale, st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([None, 1.5]), st.sampled_from([1.0, 0.7])
)


@given(LAYOUTS, LAYOUTS, LAYOUTS, st.integers(0, 5), st.booleans(), st.booleans(), SCALES)
def test_gradient(columns_as, log_sum_exp_as, grad_as, k, with_entropy, in_place, scale) -> None:
    products = rows()
    logits = scale(products)
    columns = chosen(k, columns_as, -2, COLUMNS + 4)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1) if with_entropy else None
    given_gradients = TokenGradients(
        log_sum_exp_as(logits.logsumexp(1)),
        grad_as(torch.rand(TOKENS, device=DEVICE))[:, None].expand(TOKENS, k),
        grad_as(torch.rand(TOKENS, device=DEVICE)) if with_entropy else None,
        entropy,
    )
    wide = TokenGradients(*(None if value is None else value.double() for value in given_gradients))
    expected = torch.full_like(products, 99, dtype=torch.float64)
    softmax.logits_to_gradient(products.double(), expected, 2, columns, scale, wide)
    out = products if in_place else torch.full_like(products, 99)
    kernels.logits_to_gradient(products, out, 2, columns, scale, given_gradients)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@given(LAYOUTS, st.integers(0, 5), st.booleans(), SCALES, st.sampled_from([16, 4096]))
def test_statistics(columns_as, k, weighted, scale, block) -> None:
    """In two blocks and the rest of a row, and in one that is wider than it."""
    tiles, columns = (rows(), rows() + 1), chosen(k, columns_as, -2, 2 * COLUMNS + 3)
    found = []
    for form, dtype in ((kernels, torch.float32), (softmax, torch.float64)):
        statistics = Statistics.of_no_logits(columns, dtype, weighted=weighted, argmax=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "STATISTICS_BLOCK", block)
            for index, products in enumerate(tiles):
                form.update_statistics(products.to(dtype), index * COLUMNS, columns, scale, statistics)
        found.append(vars(statistics).values())
    for ours, exact in zip(*found, strict=True):
        if exact is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=1e-5, atol=1e-5)


def test_what_is_written_must_be_dense() -> None:
    vector, columns = torch.zeros(TOKENS, device=DEVICE), torch.zeros(TOKENS, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.update_statistics(
            rows(), 0, columns, LogitScale(), Statistics(strided(vector), vector, vector[:, None])
        )
    for tiles in ((rows(dense=False), rows()), (rows(), rows(dense=False))):
        with pytest.raises(ValueError, match="dense rows"):
            kernels.logits_to_gradient(*tiles, 0, columns, LogitScale(), TokenGradients(vector, vector[:, None]))


@pytest.mark.parametrize(("form", "block"), [(kernels, 1), (kernels, 2), (kernels, 4096), (softmax, 0)])
def test_tiles_of_minus_infinity(form, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is nothing but that; the second holds one among numbers."""
    monkeypatch.setattr(kernels, "STATISTICS_BLOCK", block)
    statistics = Statistics.of_no_logits(
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.float32, weighted=True
    )
    tiles = torch.full((1, 3), -math.inf), torch.tensor([[1.0, 2.0, -math.inf]])
    for tile in tiles:
        form.update_statistics(
            tile.to(DEVICE), 0, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), LogitScale(), statistics
        )
    p = torch.tensor([1.0, 2.0], device=DEVICE).softmax(0)
    log_sum_exp = statistics.largest + statistics.sum_exp.log()
    torch.testing.assert_close(log_sum_exp, torch.tensor([1.0, 2.0], device=DEVICE).logsumexp(0)[None])
    entropy = statistics.sum_exp.log() - statistics.weighted / statistics.sum_exp
    torch.testing.assert_close(entropy, -(p * p.log()).sum()[None])
    ones = torch.ones(1, device=DEVICE)
    tile = tiles[1].to(DEVICE)
    form.logits_to_gradient(
        tile,
        tile,
        0,
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
        LogitScale(),
        TokenGradients(log_sum_exp, ones[:, None], ones, entropy),
    )
    assert tile.isfinite().all() and tile[0, 2] == 0


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
    losses = tiled_linear_cross_entropy(hidden, weight, labels, HeadLoop()).loss
    logits = hidden.double() @ weight.double().t()
    exact = logits.logsumexp(-1) - logits.gather(-1, labels[..., None]).squeeze(-1)
    for ours, right in zip(*(torch.autograd.grad(reduce(of), (hidden, weight)) for of in (losses, exact)), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_fp32", [False, True])
def test_scores_through_the_kernels(in_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "softmax_for", lambda logits: kernels)
    case = problem((7, 3), 50, 16, 3, seed=1)
    dtype = torch.bfloat16 if in_fp32 else torch.float32
    hidden, weight = (value.detach().to(DEVICE, dtype).requires_grad_() for value in case[:2])
    columns, mask, *upstream = (value.to(DEVICE) for value in case[2:])
    loop = HeadLoop(
        HeadTiles(tokens=4, vocabulary_tiles=3),
        scale=LogitScale(softcap=3.0),
        entropy=True,
        top_k=4,
        logits_in_fp32=in_fp32,
    )
    scores = scores_of(hidden, weight, columns, loop, mask)
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    exact = plain_scores(*wide, columns, mask, softcap=3.0, top_k=4)
    for name in ("log_probs", "entropy", "top_log_probs"):
        torch.testing.assert_close(getattr(scores, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(
        (scores.log_probs, scores.entropy), (hidden, weight), [grad.float() for grad in upstream]
    )
    expected = torch.autograd.grad((exact.log_probs, exact.entropy), wide, upstream)
    for ours, right in zip(found, expected, strict=True):
        assert (ours.double() - right).norm() <= (1e-2 if in_fp32 else 1e-5) * right.norm()

"""The tiled head against dense logits in float64, on one rank: losses, gradients, tiles, refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling.tiles import head_memory
from megatron_tiling.tiles.gemm import gemm_into
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.softmax import LogitScale


def dense_losses(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Megatron's formulas with the logits whole: a label outside the vocabulary loses its term, not its gradient."""
    logits = hidden @ weight.t() * scale
    vocabulary = logits.shape[-1]
    largest = logits.detach().max(dim=-1).values
    log_sum = (logits - largest[..., None]).logsumexp(dim=-1)
    inside = (labels >= 0) & (labels < vocabulary)
    label_logit = logits.gather(-1, labels.where(inside, 0)[..., None]).squeeze(-1)
    # A label outside the vocabulary has no term; the largest logit is a constant in all of them.
    return log_sum - torch.where(inside, label_logit - largest, 0.0)


def problem(
    tokens: tuple[int, int], vocabulary: int, hidden_size: int, seed: int, outside: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels (some outside the vocabulary) and upstream gradients (some zero: masked)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*tokens, hidden_size, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, dtype=torch.float64, generator=generator).requires_grad_()
    low, high = (-3, vocabulary + 3) if outside else (0, vocabulary)
    labels = torch.randint(low, high, tokens, generator=generator)
    upstream = torch.randn(tokens, dtype=torch.float64, generator=generator)
    upstream *= torch.rand(tokens, generator=generator) > 0.2
    return hidden, weight, labels, upstream


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.tuples(st.integers(1, 7), st.integers(1, 3)),
    vocabulary=st.integers(2, 40),
    hidden_size=st.integers(1, 9),
    token_tile=st.integers(1, 21),
    vocabulary_tiles=st.integers(1, 40),
    scale=st.sampled_from([1.0, 0.37, -2.0]),
    keep=st.sampled_from([None, 0, 2, "all"]),
    seed=st.integers(0, 2**16),
)
def test_losses_and_gradients_equal_dense(
    tokens, vocabulary, hidden_size, token_tile, vocabulary_tiles, scale, keep, seed
):
    hidden, weight, labels, upstream = problem(tokens, vocabulary, hidden_size, seed)
    expected = dense_losses(hidden, weight, labels, scale)
    gradients = torch.autograd.grad(expected, (hidden, weight), upstream)

    tiles = HeadTiles(tokens=token_tile, vocabulary_tiles=vocabulary_tiles, keep=keep)
    loop = HeadLoop(tiles, scale=LogitScale(scale), keep_largest=True)
    result = tiled_linear_cross_entropy(hidden, weight, labels, loop)

    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-10)
    for gradient, reference in zip(
        torch.autograd.grad(result.loss, (hidden, weight), upstream), gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)
    logits = (hidden @ weight.t() * scale).detach()
    for largest in (result.largest, logits.gather(-1, result.argmax.unsqueeze(-1)).squeeze(-1)):
        torch.testing.assert_close(largest, logits.amax(dim=-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [None, 0, 1, 5, "all"])
def test_a_retained_graph_gives_the_same_gradients_again(keep):
    """The first backward pass leaves gradients where the kept logits were."""
    hidden, weight, labels, upstream = problem((5, 3), 23, 4, seed=8)
    loss = tiled_linear_cross_entropy(
        hidden, weight, labels, HeadLoop(HeadTiles(tokens=6, vocabulary_tiles=4, keep=keep))
    ).loss
    expected = torch.autograd.grad(dense_losses(hidden, weight, labels), (hidden, weight), upstream)
    for _ in range(3):
        again = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
        torch.testing.assert_close(again, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("keep", "made"), [(0, 24), (None, 12), (1, 23), (5, 19), ("all", 12), (99, 12)])
def test_kept_tiles_are_not_made_again(keep, made, monkeypatch):
    calls = []
    monkeypatch.setattr(head_memory, "gemm_into", lambda *args, **kwargs: calls.append(gemm_into(*args, **kwargs)))
    hidden, weight, labels, upstream = problem((5, 3), 23, 4, seed=8)
    weight.requires_grad_(False)
    loop = HeadLoop(HeadTiles(tokens=6, vocabulary_tiles=4, keep=keep))
    tiled_linear_cross_entropy(hidden, weight, labels, loop).loss.backward(upstream)
    assert len(calls) == made + 12  # tiles made, input gradients


def test_gradcheck():
    hidden, weight, labels, _ = problem((3, 2), 7, 4, seed=1, outside=False)
    loop = HeadLoop(HeadTiles(tokens=4, vocabulary_tiles=3), scale=LogitScale(0.7))
    assert torch.autograd.gradcheck(lambda x, w: tiled_linear_cross_entropy(x, w, labels, loop).loss, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, labels, upstream = problem((5, 2), 11, 4, seed=2)
    expected = torch.autograd.grad(dense_losses(hidden, weight, labels), (hidden, weight), upstream)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    trained = weight if frozen == "hidden" else hidden
    loop = HeadLoop(HeadTiles(tokens=3, vocabulary_tiles=4))
    tiled_linear_cross_entropy(hidden, weight, labels, loop).loss.backward(upstream)
    torch.testing.assert_close(trained.grad, expected[frozen == "hidden"], rtol=1e-10, atol=1e-10)
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_without_gradients_the_cut_is_for_one_pass(monkeypatch):
    sizes = []
    cut = HeadTiles.cut
    monkeypatch.setattr(HeadTiles, "cut", lambda tiles, of: sizes.append(of) or cut(tiles, of))
    hidden, weight, labels, _ = problem((5, 2), 11, 4, seed=2)
    with torch.no_grad():
        losses = tiled_linear_cross_entropy(hidden, weight, labels, HeadLoop(HeadTiles())).loss
    assert (sizes[0].dgrad, sizes[0].wgrad) == (False, False)
    torch.testing.assert_close(losses, dense_losses(hidden, weight, labels).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tiles", [HeadTiles(tokens=4, vocabulary_tiles=3), HeadTiles()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_gradient_is_added_to_main_grad(tiles, dtype):
    hidden, weight, labels, upstream = problem((5, 2), 11, 4, seed=3)
    expected = torch.autograd.grad(dense_losses(hidden, weight, labels), weight, upstream)[0]
    main_grad = torch.randn_like(weight, dtype=torch.float64)
    parameter = torch.nn.Parameter(weight.detach().to(dtype))
    parameter.main_grad = main_grad.clone().detach()
    parameter.grad_added_to_main_grad = False
    loop = HeadLoop(tiles, fuse_wgrad=True)
    result = tiled_linear_cross_entropy(hidden.detach().to(dtype), parameter, labels, loop)
    result.loss.backward(upstream.to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(parameter.main_grad, main_grad.detach() + expected, rtol=tolerance, atol=tolerance)
    assert parameter.grad_added_to_main_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_no_further_from_float64_than_dense(dtype):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(64, 2, 32, generator=generator).to(dtype)
    weight = (torch.randn(512, 32, generator=generator) * 0.3).to(dtype)
    labels = torch.randint(0, 512, (64, 2), generator=generator)
    upstream = torch.rand(64, 2, generator=generator)

    def errors(losses_of, *, wide):
        x, w = (copy.deepcopy(t.double() if wide else t).requires_grad_() for t in (hidden, weight))
        losses = losses_of(x, w)
        losses.backward(upstream.to(losses.dtype))
        return losses.detach().double(), x.grad.double(), w.grad.double()

    reference = errors(lambda x, w: dense_losses(x, w, labels), wide=True)
    dense = errors(lambda x, w: _dense_narrow(x, w, labels), wide=False)
    loop = HeadLoop(HeadTiles(vocabulary_tiles=8))
    tiled = errors(lambda x, w: tiled_linear_cross_entropy(x, w, labels, loop).loss, wide=False)
    for ours, theirs, exact in zip(tiled, dense, reference, strict=True):
        assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm()


def _dense_narrow(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.logsumexp(dim=-1) - logits.gather(-1, labels[..., None]).squeeze(-1)


def test_no_tokens():
    hidden = torch.zeros(0, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loop = HeadLoop(HeadTiles(tokens=3, vocabulary_tiles=2))
    loss = tiled_linear_cross_entropy(hidden, weight, torch.zeros(0, 2, dtype=torch.int64), loop).loss
    loss.sum().backward()
    assert loss.shape == (0, 2) and hidden.grad.shape == hidden.shape and not weight.grad.any()


def test_a_non_contiguous_input():
    hidden, weight, labels, upstream = problem((4, 3), 9, 5, seed=5)
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loop = HeadLoop(HeadTiles(tokens=5, vocabulary_tiles=2))
    tiled_linear_cross_entropy(turned, weight, labels, loop).loss.backward(upstream)
    expected = torch.autograd.grad(dense_losses(hidden, weight, labels), hidden, upstream)[0]
    torch.testing.assert_close(turned.grad, expected, rtol=1e-10, atol=1e-10)


def test_labels_of_another_shape_are_refused():
    hidden, weight, labels, _ = problem((4, 3), 9, 5, seed=7)
    with pytest.raises(ValueError, match=r"labels have shape \[3, 4\], the hidden states \[4, 3\] tokens"):
        tiled_linear_cross_entropy(hidden, weight, labels.t(), HeadLoop())

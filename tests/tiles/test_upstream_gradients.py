"""Backward passes of the tile loops take upstream gradients of any layout, as torch in float64 does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head import HeadLoop, tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
from megatron_tiling.tiles.mlp import MLPLoop, tiled_mlp
from megatron_tiling.tiles.scores import tiled_scores
from tests.tiles.plain_scores import plain_scores, problem

TOKENS, HIDDEN, FEATURES = (5, 3), 6, 8
Layout = Callable[[Tensor], Tensor]


def one_for_all(grad: Tensor) -> Tensor:
    return grad.flatten()[0].expand(grad.shape)


def one_for_all_tokens(grad: Tensor) -> Tensor:
    return grad[:1, :1].expand(grad.shape)


def transposed(grad: Tensor) -> Tensor:
    return grad.transpose(0, 1).contiguous().transpose(0, 1)


def reversed_dimensions(grad: Tensor) -> Tensor:
    return grad.permute(*range(grad.dim())[::-1]).contiguous().permute(*range(grad.dim())[::-1])


def every_other(grad: Tensor) -> Tensor:
    return torch.stack([grad, torch.full_like(grad, 99)], dim=-1)[..., 0]


def window(grad: Tensor) -> Tensor:
    return F.pad(grad, (2, 3, 1, 0), value=99)[..., 1:, 2:-3]


LAYOUTS = st.sampled_from([one_for_all, one_for_all_tokens, transposed, reversed_dimensions, every_other, window])


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def compare(outputs: Any, exact: Any, inputs: list[Tensor], layouts: list[Layout]) -> None:
    """Gradients of tiled ``outputs`` for upstream gradients so laid out; of ``exact`` for the same, laid out flat."""
    upstream = [layout(torch.randn_like(output)) for output, layout in zip(outputs, layouts, strict=True)]
    ours = torch.autograd.grad(outputs, inputs, upstream)
    right = torch.autograd.grad(exact, inputs, [grad.contiguous() for grad in upstream])
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=30)
@given(layouts=st.lists(LAYOUTS, min_size=3, max_size=3), in_splits=st.integers(1, 3), combine=st.booleans())
def test_linear(layouts: list[Layout], in_splits: int, combine: bool) -> None:
    x, weight, bias = inputs = leaves((*TOKENS, HIDDEN), (FEATURES, HIDDEN), (FEATURES,))
    grid = TileGrid(HIDDEN, FEATURES, in_splits, 3)
    result = tiled_linear(x, weight, bias, TileLoop(grid, combine_out_splits=combine))
    exact = F.linear(x, weight, bias)
    outputs = [result] if combine else result
    expected = [exact] if combine else exact.split([grid.out_size(o) for o in range(3)], dim=-1)
    compare(outputs, expected, inputs, layouts[: len(outputs)])


@settings(max_examples=30)
@given(layout=LAYOUTS, gated=st.booleans(), keep=st.integers(0, 3), with_scale=st.booleans())
def test_mlp(layout: Layout, gated: bool, keep: int, with_scale: bool) -> None:
    halves = 2 if gated else 1
    inputs = leaves((*TOKENS, HIDDEN), (halves * FEATURES, HIDDEN), (halves * FEATURES,), (HIDDEN, FEATURES), TOKENS)
    hidden, fc1, bias, fc2, scale = inputs

    def activation(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        pre = pre if bias is None else pre + bias
        activated = F.silu(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1] if gated else F.gelu(pre)
        return activated if scale is None else activated * scale[..., None]

    given_scale = scale if with_scale else None
    result = tiled_mlp(hidden, fc1, bias, fc2, given_scale, MLPLoop((0, 3, 5, 8), Activation(gated, activation), keep))
    exact = activation(F.linear(hidden, fc1), bias, given_scale) @ fc2.t()
    compare([result], [exact], inputs if with_scale else inputs[:-1], [layout])


@settings(max_examples=30)
@given(layout=LAYOUTS, tokens=st.integers(1, 15), vocabulary=st.integers(1, FEATURES))
def test_head(layout: Layout, tokens: int, vocabulary: int) -> None:
    hidden, weight = inputs = leaves((*TOKENS, HIDDEN), (FEATURES, HIDDEN))
    labels = torch.randint(0, FEATURES, TOKENS)
    loop = HeadLoop(HeadTiles(tokens=tokens, vocabulary_tiles=vocabulary))
    loss = tiled_linear_cross_entropy(hidden, weight, labels, loop).loss
    exact = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS)
    compare([loss], [exact], inputs, [layout])


@settings(max_examples=30)
@given(layouts=st.lists(LAYOUTS, min_size=2, max_size=2), k=st.integers(1, 3), masked=st.booleans())
def test_scores(layouts: list[Layout], k: int, masked: bool) -> None:
    case = problem(TOKENS, FEATURES, HIDDEN, k, seed=k)
    mask = case.mask if masked else None
    scores = tiled_scores(*case[:3], entropy=True, mask=mask)
    plain = plain_scores(*case[:3], mask)
    compare([scores.log_probs, scores.entropy], [plain.log_probs, plain.entropy], list(case[:2]), layouts)


@pytest.mark.parametrize("layout", [one_for_all, transposed, window])
def test_fused_weight_gradients(layout: Layout) -> None:
    x, weight, labels = *leaves((*TOKENS, HIDDEN), (FEATURES, HIDDEN)), torch.randint(0, FEATURES, TOKENS)
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    grid = TileGrid(HIDDEN, FEATURES, 2, 3)
    linear = tiled_linear(x, weight, None, TileLoop(grid, fuse_wgrad=True))
    loss = tiled_linear_cross_entropy(x, weight, labels, HeadLoop(fuse_wgrad=True)).loss
    assert isinstance(linear, Tensor)
    upstream = [layout(torch.randn_like(output)) for output in (linear, loss)]
    torch.autograd.backward([linear, loss], upstream)
    logits = F.linear(x, weight)
    exact = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(TOKENS)
    right = torch.autograd.grad([logits, exact], weight, [grad.contiguous() for grad in upstream])
    torch.testing.assert_close(weight.main_grad, right[0])  # type: ignore[attr-defined]

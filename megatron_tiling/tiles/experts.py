"""The tile loop of grouped experts whose weights are resident, as an autograd function over their weights.

Rows are sorted by expert. A tile is a group of neighbouring experts: fc1, activation with the router's probabilities
and fc2 of these experts, each a grouped GEMM, then the next tile. An expert with more rows than a tile should have is
several tiles, as in ``tiles/mlp.py``: the forward pass takes some of its rows at a time, the backward pass some of its
features. The activation is always computed again, the fc1 product where its pre-activation was not kept.

Depends on torch alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiling.tiles.expert_backward import Backward, Later
from megatron_tiling.tiles.expert_groups import Group
from megatron_tiling.tiles.expert_loop import ExpertsLoop, Parts, fc1_product, of_one_bias
from megatron_tiling.tiles.expert_products import rows_of_each
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import scratch


class Source(NamedTuple):
    """Where the rows of the input come from: ``hidden`` is ``tokens [t, h]`` at ``indices [n]``, a copy of these."""

    tokens: Tensor
    indices: Tensor


def tiled_experts(
    hidden: Tensor,
    scale: Tensor,
    fc1: Sequence[Tensor],
    fc1_biases: Sequence[Tensor],
    fc2: Sequence[Tensor],
    loop: ExpertsLoop,
    source: Source | None = None,
) -> Tensor:
    """``(scale * activation(hidden @ fc1.T + fc1_bias)) @ fc2.T`` of every expert and its rows, tile after tile.

    Args:
        hidden: ``[n, h]``, sorted by expert.
        scale: ``[n]``, the router's probabilities.
        fc1, fc2: the parameters: one ``[halves * f, h]`` and one ``[h_out, f]`` an expert, gate above up, or what
            ``loop`` makes these of.
        fc1_biases: ``[halves * f]`` of each expert, or none.
        loop: the tiles and the options.
        source: is kept for the backward pass in place of ``hidden``, whose rows are gathered again, a tile at a time.

    Returns:
        ``[n, h_out]``.
    """
    source = None if source is None else Source(source.tokens.detach(), source.indices)
    later = anchor = None
    if source is None and all(group.keeps_all and len(group.columns) == 1 for group in loop.groups):
        later = Later()
        anchor = _Fc1Gradients.apply(later, hidden, *fc1)
    options = Parts(fc1, fc1_biases, fc2), loop, source, torch.is_grad_enabled(), later
    output: Tensor = _TiledExperts.apply(hidden, scale, anchor, *options, *fc1, *fc1_biases, *fc2)
    return output


class _Fc1Gradients(torch.autograd.Function):
    """Where all tiles of whole experts keep their pre-activations: fc1's backward pass, in a node of its own.

    Autograd has let go of dy ``[n, h_out]`` before it runs, so that dx ``[n, h]`` does not lie beside it. It knows that
    ``_TiledExperts`` comes first by an output that is nothing else, and empty.
    """

    @staticmethod
    def forward(ctx: Any, later: Later, hidden: Tensor, *fc1: Tensor) -> Tensor:
        ctx.later = later
        return hidden.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.later.run
        del ctx.later.run  # with what it holds
        return None, *run()


class _TiledExperts(torch.autograd.Function):
    """The tile loop. ``n`` rows of a tile, ``n_e`` those of one of its experts, for each of which the GEMMs stand.

    ==========  ==================================================  ===================================================
    fc1         x ``[n_e, h]``, U ``[f, h]``                        p ``[n, f]`` = x U^T
    activation  p, b ``[f]``, s ``[n]``                             a ``[n, f]`` = s * act(p + b)
    fc2         a, W ``[h_out, f]``                                 y ``[n_e, h_out]`` = a W^T
    ----------  --------------------------------------------------  ---------------------------------------------------
    fc1         x, U                                                p = x U^T, unless kept
    fc2 dgrad   dy ``[n_e, h_out]``, W                              da ``[n, f]`` = dy W
    activation  da, p, b, s                                         p := dp, da := a, both in place
    fc1 dgrad   dp, U                                               dx ``[n_e, h]`` = dp U
    fc2 wgrad   dy, a                                               dW ``[h_out, f]`` = dy^T a
    fc1 wgrad   dp, x                                               dU ``[f, h]`` = dp^T x
    ==========  ==================================================  ===================================================

    In fc1 ``f`` is gate and up if gated. Of an expert in several tiles, forward rows are those of a step, and backward
    features those of a tile: dx is the sum over them. fc1's products of neighbouring tiles that are kept are one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        scale: Tensor,
        anchor: Tensor | None,
        parts: Parts,
        loop: ExpertsLoop,
        source: Source | None,
        grad_enabled: bool,
        later: Later | None,
        *parameters: Tensor,
    ) -> Tensor:
        fc1, biases, fc2 = parts.like(parameters).of_experts(loop)
        output = hidden.new_empty(hidden.shape[0], fc2[0].shape[0])
        records = grad_enabled and any(ctx.needs_input_grad)
        kept = [_forward(loop, group, hidden, scale, fc1, biases, fc2, output, records) for group in loop.groups]
        if records:
            recomputes = any(not group.keeps_all for group in loop.groups)
            ctx.needs = parts.like(ctx.needs_input_grad[-len(parameters) :])
            ctx.loop, ctx.kept_is_intact = loop, True
            ctx.later = later if ctx.needs_input_grad[2] else None
            ctx.parts = parts.like(parameters)  # they carry main_grad, which saved tensors may lose
            inputs = (hidden, None) if source is None else source
            needs_input = (any(ctx.needs.fc1) or recomputes) and not loop.products.saves_hidden
            saved = *(inputs if needs_input else (None, None)), scale, *parameters, *kept, *loop.products.saved()
            ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return Backward(ctx, grad_output).run()


def _forward(
    loop: ExpertsLoop,
    group: Group,
    hidden: Tensor,
    scale: Tensor,
    fc1: list[Tensor],
    biases: list[Tensor],
    fc2: list[Tensor],
    output: Tensor,
    records: bool,
) -> Tensor | None:
    """The rows of a group, into ``output``; ``[n, halves, f_kept]``, the pre-activations that are kept, if any."""
    halves, rows = loop.activation.halves, group.rows
    kept, columns, keeps_all = None, group.kept_columns, group.keeps_all
    if records and group.kept:
        kept = scratch(hidden, rows.stop - rows.start, halves, columns.stop)
    if kept is not None and keeps_all:
        fc1_product(loop, group.segments, hidden, fc1, kept)
    for step in group.steps:
        start, stop = step[0].rows.start, step[-1].rows.stop
        here = slice(start - rows.start, stop - rows.start)
        if kept is not None and keeps_all:
            pre = kept[here]
        else:
            pre = scratch(hidden, stop - start, halves, loop.features)
            fc1_product(loop, step, hidden, fc1, pre)
            if kept is not None:
                kept[here].copy_(pre[:, :, columns])
        activated = scratch(hidden, stop - start, loop.features)
        for segment in of_one_bias(step, biases):
            part = slice(segment.rows.start - start, segment.rows.stop - start)
            bias = loop.activation.bias_of(biases[segment.expert] if biases else None)
            loop.activation.forward([pre[part].transpose(0, 1)], bias, scale[segment.rows], activated[part])
        operands = loop.products.rows("activation", activated, step, start, rowwise=True)
        weights = loop.products.weights("fc2", fc2, step, columnwise=False)
        loop.products.gemm(rows_of_each(output, step), operands, weights, "NT", False)
        del pre, activated, operands, weights  # before the next ones are made, or there would be two of each
    return kept

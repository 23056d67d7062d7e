"""The tile loop of grouped experts whose weights are resident, as one autograd function over their weights.

Rows are sorted by expert. A tile is a group of neighbouring experts: fc1, activation with the router's probabilities
and fc2 of these experts, each a grouped GEMM, then the next tile. An expert with more rows than a tile should have is
several tiles, as in ``tiles/mlp.py``: the forward pass takes some of its rows at a time, the backward pass some of its
features. The activation is always computed again, the fc1 product where its pre-activation was not kept.

Depends on torch alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.expert_groups import Group, Segment, rows_of
from megatron_tiling.tiles.expert_products import Products, rows_of_each
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.spans import Span, padded
from megatron_tiling.tiles.wgrad import WeightGrad


class Source(NamedTuple):
    """Where the rows of the input come from: ``hidden`` is ``tokens [t, h]`` at ``indices [n]``, a copy of these."""

    tokens: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ExpertsLoop:
    """How ``tiled_experts`` runs.

    Args:
        groups: the tiles.
        features: intermediate features of an expert on this rank.
        activation: between fc1 and fc2.
        products: of the experts of a tile; those of an expert some of whose features make a tile are torch's.
        fuse_wgrad: add weight gradients to ``weight.main_grad`` in place, and give autograd none.
        fp32_accumulate: sum the input gradient of an expert in several tiles in float32.
        fc1_of_experts, fc2_of_experts: views ``[halves * f, h]`` and ``[h_out, f]`` of each expert in a sequence of
            tensors shaped as the parameters.
    """

    groups: Sequence[Group]
    features: int
    activation: Activation
    products: Products = field(default_factory=Products)
    fuse_wgrad: bool = False
    fp32_accumulate: bool = False
    fc1_of_experts: Callable[[Sequence[Tensor]], list[Tensor]] = list
    fc2_of_experts: Callable[[Sequence[Tensor]], list[Tensor]] = list


class _Parts(NamedTuple):
    """Parameters, or what there is of each of them."""

    fc1: Sequence[Any]
    biases: Sequence[Any]
    fc2: Sequence[Any]

    def like(self, values: Sequence[Any]) -> "_Parts":
        """As many values each."""
        fc1, biases = len(self.fc1), len(self.fc1) + len(self.biases)
        return _Parts(values[:fc1], values[fc1:biases], values[biases:])

    def of_experts(self, loop: ExpertsLoop) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """fc1, its bias and fc2 of each expert."""
        return loop.fc1_of_experts(self.fc1), list(self.biases), loop.fc2_of_experts(self.fc2)


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
    options = _Parts(fc1, fc1_biases, fc2), loop, source, torch.is_grad_enabled()
    output: Tensor = _TiledExperts.apply(hidden, scale, *options, *fc1, *fc1_biases, *fc2)
    return output


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
        parts: _Parts,
        loop: ExpertsLoop,
        source: Source | None,
        grad_enabled: bool,
        *parameters: Tensor,
    ) -> Tensor:
        fc1, biases, fc2 = parts.like(parameters).of_experts(loop)
        output = hidden.new_empty(hidden.shape[0], fc2[0].shape[0])
        records = grad_enabled and any(ctx.needs_input_grad)
        kept = [_forward(loop, group, hidden, scale, fc1, biases, fc2, output, records) for group in loop.groups]
        if records:
            recomputes = any(group.kept < group.count for group in loop.groups)
            ctx.needs = parts.like(ctx.needs_input_grad[-len(parameters) :])
            ctx.loop, ctx.kept_is_intact = loop, True
            ctx.parts = parts.like(parameters)  # they carry main_grad, which saved tensors may lose
            inputs = (hidden, None) if source is None else source
            needs_input = (any(ctx.needs.fc1) or recomputes) and not loop.products.saves_hidden
            saved = *(inputs if needs_input else (None, None)), scale, *parameters, *kept, *loop.products.saved()
            ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _Backward(ctx, grad_output).run()


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
    kept, columns, keeps_all = None, group.kept_columns, group.kept == group.count
    if records and group.kept:
        kept = scratch(hidden, rows.stop - rows.start, halves, columns.stop)
    if kept is not None and keeps_all:
        _fc1(loop, group.segments, hidden, fc1, kept)
    for step in group.steps:
        start, stop = step[0].rows.start, step[-1].rows.stop
        here = slice(start - rows.start, stop - rows.start)
        if kept is not None and keeps_all:
            pre = kept[here]
        else:
            pre = scratch(hidden, stop - start, halves, loop.features)
            _fc1(loop, step, hidden, fc1, pre)
            if kept is not None:
                kept[here].copy_(pre[:, :, columns])
        activated = scratch(hidden, stop - start, loop.features)
        for segment in _of_one_bias(step, biases):
            part = slice(segment.rows.start - start, segment.rows.stop - start)
            bias = loop.activation.bias_of(biases[segment.expert] if biases else None)
            loop.activation.forward([pre[part].transpose(0, 1)], bias, scale[segment.rows], activated[part])
        operands = loop.products.rows("activation", activated, step, start, rowwise=True)
        weights = loop.products.weights("fc2", fc2, step, columnwise=False)
        loop.products.gemm(rows_of_each(output, step), operands, weights, "NT", False)
        del pre, activated, operands, weights  # before the next ones are made, or there would be two of each
    return kept


def _fc1(
    loop: ExpertsLoop,
    segments: Sequence[Segment],
    hidden: Tensor,
    fc1: list[Tensor],
    pre: Tensor,
    start: int = 0,
    **options: bool,
) -> Sequence[Any]:
    """``pre [n, halves, f]`` of these rows, of an input that begins at row ``start``; the operands of that input."""
    operands = loop.products.rows("hidden", hidden, segments, start, rowwise=True, **options)
    weights = loop.products.weights("fc1", fc1, segments, columnwise=False)
    loop.products.gemm(rows_of_each(pre.flatten(1), segments, segments[0].rows.start), operands, weights, "NT", False)
    return operands


def _of_one_bias(segments: Sequence[Segment], biases: list[Tensor]) -> Sequence[Segment]:
    """What the activation takes at once: the rows of one expert, or all of them where there are no biases."""
    if biases:
        return segments
    return [Segment(segments[0].expert, rows_of(segments))]


class _WeightGrads:
    """The weight gradients of fc1 or fc2, one view an expert."""

    def __init__(
        self, parameters: Sequence[Tensor], of_experts: Callable[[Sequence[Tensor]], list[Tensor]], fuse: bool
    ) -> None:
        fuse = fuse and all(getattr(parameter, "main_grad", None) is not None for parameter in parameters)
        self._grads = [WeightGrad(parameter, fuse) for parameter in parameters]
        self.fused = fuse
        self._filled: set[int] = set()
        self.tensors = of_experts([grad.tensor for grad in self._grads])

    def clear(self, experts: Iterable[int]) -> None:
        """Those of experts without rows."""
        for expert in () if self.fused else experts:
            self.tensors[expert].zero_()

    def of(self, segments: Sequence[Segment]) -> tuple[list[Tensor], bool]:
        """Of these experts, and whether products are to be added to what is there."""
        accumulate = self.fused or segments[0].expert in self._filled  # one whose rows make several tiles
        self._filled.update(expert for expert, _ in segments)
        return [self.tensors[expert] for expert, _ in segments], accumulate

    def results(self) -> list[Tensor | None]:
        return [grad.result() for grad in self._grads]


class _Backward:
    """One backward pass of ``_TiledExperts``: what its steps share."""

    def __init__(self, ctx: Any, grad_output: Tensor) -> None:
        self.loop: ExpertsLoop = ctx.loop
        self.halves = self.loop.activation.halves
        parts, self.needs = ctx.parts, ctx.needs
        self.needs_dgrad, self.needs_scale = ctx.needs_input_grad[:2]
        self.needs_bias = any(self.needs.biases)
        self.hidden, self.indices, self.scale, *saved = ctx.saved_tensors
        count = sum(map(len, parts))
        parameters, self.kept, rest = saved[:count], saved[count:][: len(self.loop.groups)], saved[count:]
        if not ctx.kept_is_intact:  # a second pass with retain_graph=True: the first one wrote its gradients there
            self.kept = [None] * len(self.kept)
            if self.hidden is None:
                raise RuntimeError(
                    "a second backward pass through tiled experts in FP8, or whose fc1 is frozen, after the first one "
                    "used up the kept pre-activations: give --tiled-mlp-keep 0 with retain_graph=True"
                )
        else:
            self.loop.products.restore(rest[len(self.kept) :])
        ctx.kept_is_intact = False
        self.fc1, self.biases, self.fc2 = parts.like(parameters).of_experts(self.loop)
        self.dy = grad_output.contiguous()
        self.dgrad = self.dy.new_empty(self.dy.shape[0], self.fc1[0].shape[1]) if self.needs_dgrad else None
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        self.scale_grad = torch.zeros_like(self.scale, dtype=wide) if self.needs_scale else None
        self.bias_grads = [torch.zeros_like(bias) if self.needs_bias else None for bias in self.biases]
        loop, fuse = self.loop, self.loop.fuse_wgrad
        self.fc1_grads = _WeightGrads(parts.fc1, loop.fc1_of_experts, fuse) if any(self.needs.fc1) else None
        self.fc2_grads = _WeightGrads(parts.fc2, loop.fc2_of_experts, fuse) if any(self.needs.fc2) else None

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of ``_TiledExperts``."""
        busy = {expert for group in self.loop.groups for expert, _ in group.segments}
        for grads in (self.fc1_grads, self.fc2_grads):
            if grads is not None:
                grads.clear(expert for expert in range(len(self.fc1)) if expert not in busy)
        for group, kept in zip(self.loop.groups, self.kept, strict=True):
            kept = None if kept is None else kept.detach().data
            (self._whole_experts if len(group.columns) == 1 else self._one_expert)(group, kept)
        fc1 = [None] * len(self.needs.fc1) if self.fc1_grads is None else self.fc1_grads.results()
        fc2 = [None] * len(self.needs.fc2) if self.fc2_grads is None else self.fc2_grads.results()
        scale = None if self.scale_grad is None else self.scale_grad.to(self.scale.dtype)
        self.loop.products.finish()
        return self.dgrad, scale, None, None, None, None, *fc1, *self.bias_grads, *fc2

    def _input(self, rows: slice) -> Tensor:
        """``[n, h]`` of these rows."""
        if self.hidden is None:
            return self.dy[:0]  # nothing needs it
        found: Tensor = self.hidden[rows] if self.indices is None else self.hidden.index_select(0, self.indices[rows])
        return found

    def _whole_experts(self, group: Group, kept: Tensor | None) -> None:
        """Tiles of experts, with all features: fc2 tile by tile, fc1 at once."""
        products, segments, start = self.loop.products, group.segments, group.rows.start
        has_fc1, has_fc2, hidden, pre = self.fc1_grads is not None, self.fc2_grads is not None, None, kept
        if pre is None:
            pre = scratch(self.dy, group.rows.stop - start, self.halves, self.loop.features)
            again = {"columnwise": has_fc1, "again": True}
            hidden = _fc1(self.loop, segments, self._input(group.rows), self.fc1, pre, start, **again)
        for tile in group.tiles:
            here = rows_of(tile)
            activated = scratch(self.dy, here.stop - here.start, self.loop.features)  # its gradient at first
            dy = products.rows("output_grad", self.dy, tile, rowwise=True, columnwise=has_fc2)
            weights = products.weights("fc2", self.fc2, tile, columnwise=True)
            products.gemm(rows_of_each(activated, tile, here.start), dy, weights, "NN", False)
            del weights
            pre_of_tile = pre[here.start - start : here.stop - start].transpose(0, 1)
            self._activation_backward(tile, slice(None), pre_of_tile, activated)
            if self.fc2_grads is not None:
                activations = products.rows("activation", activated, tile, here.start, columnwise=True, again=True)
                self._wgrad(self.fc2_grads, tile, dy, activations)
                del activations
            del activated, dy  # before the next ones are made, or there would be two of each
        if self.dgrad is None and not has_fc1:
            return
        layouts = {"rowwise": self.dgrad is not None, "columnwise": has_fc1}
        pre_grads = products.rows("pre_grad", pre.flatten(1), segments, start, **layouts)
        if self.dgrad is not None:
            weights = products.weights("fc1", self.fc1, segments, columnwise=True)
            products.gemm(rows_of_each(self.dgrad, segments), pre_grads, weights, "NN", False)
            del weights
        if self.fc1_grads is not None:
            for part in (segments,) if hidden or self.indices is None else group.tiles:  # gathered a tile at a time
                here = rows_of(part)
                inputs = hidden or products.rows(
                    "hidden", self._input(here), part, here.start, columnwise=True, again=True
                )
                self._wgrad(self.fc1_grads, part, pre_grads[: len(part)], inputs)
                pre_grads = pre_grads[len(part) :]
                del inputs

    def _wgrad(
        self, grads: _WeightGrads, segments: Sequence[Segment], grad: Sequence[Any], inputs: Sequence[Any]
    ) -> None:
        totals, accumulate = grads.of(segments)
        self.loop.products.gemm(totals, grad, inputs, "TN", accumulate)

    def _one_expert(self, group: Group, kept: Tensor | None) -> None:
        """Tiles of one expert, some of its features at a time; fc1 of those that are kept at once, as the last."""
        ((expert, rows),) = group.segments
        hidden, dgrad = self._input(rows), None if self.dgrad is None else self.dgrad[rows]
        widens = self.loop.fp32_accumulate and self.dy.dtype.itemsize < 4
        total = dgrad if dgrad is None or not widens else torch.empty_like(dgrad, dtype=torch.float32)
        number = 0 if kept is None else group.kept
        spans = [[columns] for columns in group.columns[number:]] + ([group.columns[:number]] if number else [])
        for tiles in spans:
            span = Span(tiles, self.halves, self.loop.features, kept=False)
            is_kept = kept is not None and tiles is spans[-1]
            pre = kept.transpose(0, 1) if kept is not None and is_kept else span.fc1([(hidden, self.fc1[expert])])
            for columns in tiles:
                self._fc2_of_columns(expert, group.segments, columns, span.of_tile(pre, columns))
            if total is not None:
                span.dgrad(total, pre, self.fc1[expert], accumulate=tiles is not spans[0])
            if (grads := self.fc1_grads) is not None:
                span.wgrad(grads.tensors[expert], pre, hidden, accumulate=grads.fused)
            del pre  # before the next one is made, or there would be two
        if dgrad is not None and total is not None and total is not dgrad:
            dgrad.copy_(total)

    def _fc2_of_columns(self, expert: int, segments: Sequence[Segment], columns: slice, pre: Tensor) -> None:
        """fc2's products with these features of one expert; ``pre [halves, n, f_i]`` becomes its gradient."""
        dy, width = self.dy[segments[0].rows], columns.stop - columns.start
        activated = scratch(dy, dy.shape[0], padded(width))[:, :width]  # its gradient at first
        gemm_into(activated, dy, self.fc2[expert][:, columns], accumulate=False)
        self._activation_backward(segments, columns, pre, activated)
        if (grads := self.fc2_grads) is not None:
            gemm_into(grads.tensors[expert][:, columns], dy.t(), activated, accumulate=grads.fused)

    def _activation_backward(self, segments: Sequence[Segment], columns: slice, pre: Tensor, grad: Tensor) -> None:
        """In place: ``pre [halves, n, f_i]`` becomes its gradient and ``grad [n, f_i]`` the activation."""
        start, activation = segments[0].rows.start, self.loop.activation
        for segment in _of_one_bias(segments, self.biases):
            part = slice(segment.rows.start - start, segment.rows.stop - start)
            bias_grad, scale_grad = activation.backward(
                pre[:, part],
                activation.bias_of(self.biases[segment.expert] if self.biases else None, columns),
                self.scale[segment.rows],
                grad[part],
                bias_grad=self.needs_bias,
                scale_grad=self.needs_scale,
            )
            if bias_grad is not None and (whole := self.bias_grads[segment.expert]) is not None:
                activation.halved(whole)[:, columns] += bias_grad
            if scale_grad is not None and self.scale_grad is not None:
                self.scale_grad[segment.rows] += scale_grad

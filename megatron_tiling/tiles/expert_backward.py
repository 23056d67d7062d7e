"""The backward pass of the loop over tiles of experts. Depends on torch alone."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.expert_groups import Group, Segment, rows_of
from megatron_tiling.tiles.expert_loop import ExpertsLoop, fc1_product, of_one_bias
from megatron_tiling.tiles.expert_products import rows_of_each
from megatron_tiling.tiles.expert_wgrads import ExpertWeightGrads
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.spans import Span, padded


class Later:
    """The rest of a backward pass of ``_TiledExperts``: gives the gradients of the input and of fc1's parameters."""

    run: Callable[[], tuple[Tensor | None, ...]]


class Backward:
    """One backward pass of ``_TiledExperts``: what its steps share."""

    def __init__(self, ctx: Any, grad_output: Tensor) -> None:
        self.loop: ExpertsLoop = ctx.loop
        self.halves = self.loop.activation.halves
        parts, self.needs = ctx.parts, ctx.needs
        self.needs_dgrad, self.needs_scale = ctx.needs_input_grad[:2]
        self.needs_bias = any(self.needs.biases)
        self.later: Later | None = ctx.later
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
        self.empty = partial(torch.empty, dtype=self.dy.dtype, device=self.dy.device)
        self.dgrad_shape = self.dy.shape[0], self.fc1[0].shape[1]
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        self.scale_grad = torch.zeros_like(self.scale, dtype=wide) if self.needs_scale else None
        self.bias_grads = [torch.zeros_like(bias) if self.needs_bias else None for bias in self.biases]
        loop, fuse = self.loop, self.loop.fuse_wgrad
        self.fc1_grads = ExpertWeightGrads(parts.fc1, loop.fc1_of_experts, fuse) if any(self.needs.fc1) else None
        self.fc2_grads = ExpertWeightGrads(parts.fc2, loop.fc2_of_experts, fuse) if any(self.needs.fc2) else None

    @cached_property
    def dgrad(self) -> Tensor | None:
        """``[n, h]``, made where it is first written to."""
        return self.empty(self.dgrad_shape) if self.needs_dgrad else None

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of ``_TiledExperts``."""
        busy = {expert for group in self.loop.groups for expert, _ in group.segments}
        for grads in (self.fc1_grads, self.fc2_grads):
            if grads is not None:
                grads.clear(expert for expert in range(len(self.fc1)) if expert not in busy)
        rest = []
        for group, kept in zip(self.loop.groups, self.kept, strict=True):
            kept = None if kept is None else kept.detach().data
            if len(group.columns) > 1:
                self._one_expert(group, kept)
                continue
            pre, hidden = (kept, None) if kept is not None else self._fc1_again(group)
            self._fc2_backward(group, pre)
            rest.append((group, pre, hidden))
            del pre, hidden, kept
            if self.later is None:
                self._fc1_backward(*rest.pop())
        fc2 = [None] * len(self.needs.fc2) if self.fc2_grads is None else self.fc2_grads.results()
        scale = None if self.scale_grad is None else self.scale_grad.to(self.scale.dtype)
        if self.later is None:
            dgrad, *fc1 = self._finish(rest)
            return dgrad, scale, *[None] * 6, *fc1, *self.bias_grads, *fc2
        self.later.run = partial(self._finish, rest)
        del self.dy, self.later  # the one is what this waits for, the other would be a cycle
        return None, scale, self.empty(0), *[None] * (5 + len(self.needs.fc1)), *self.bias_grads, *fc2

    def _finish(self, rest: list[tuple[Group, Tensor, Sequence[Any] | None]]) -> tuple[Tensor | None, ...]:
        """The gradients of the input and of fc1's parameters, with what is left to do for them."""
        for group, pre, hidden in rest:
            self._fc1_backward(group, pre, hidden)
        self.loop.products.finish()
        fc1 = [None] * len(self.needs.fc1) if self.fc1_grads is None else self.fc1_grads.results()
        return self.dgrad, *fc1

    def _input(self, rows: slice) -> Tensor:
        """``[n, h]`` of these rows."""
        if self.hidden is None:
            return self.empty(0)  # nothing needs it
        found: Tensor = self.hidden[rows] if self.indices is None else self.hidden.index_select(0, self.indices[rows])
        return found

    def _fc1_again(self, group: Group) -> tuple[Tensor, Sequence[Any]]:
        """The pre-activations of tiles of experts, and the operands of fc1's input that they come from."""
        pre = scratch(self.dy, group.rows.stop - group.rows.start, self.halves, self.loop.features)
        again = {"columnwise": self.fc1_grads is not None, "again": True}
        hidden, start = self._input(group.rows), group.rows.start
        return pre, fc1_product(self.loop, group.segments, hidden, self.fc1, pre, start, **again)

    def _fc2_backward(self, group: Group, pre: Tensor) -> None:
        """Of tiles of experts, with all features, tile by tile: ``pre`` becomes its gradient."""
        products, start = self.loop.products, group.rows.start
        for tile in group.tiles:
            here = rows_of(tile)
            activated = scratch(self.dy, here.stop - here.start, self.loop.features)  # its gradient at first
            layouts = {"rowwise": True, "columnwise": self.fc2_grads is not None}
            dy = products.rows("output_grad", self.dy, tile, **layouts)
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

    def _fc1_backward(self, group: Group, pre_grad: Tensor, hidden: Sequence[Any] | None) -> None:
        """Of tiles of experts at once; ``hidden`` are the operands of fc1's input, where they are there."""
        products, segments, has_fc1 = self.loop.products, group.segments, self.fc1_grads is not None
        if self.dgrad is None and not has_fc1:
            return
        layouts = {"rowwise": self.dgrad is not None, "columnwise": has_fc1}
        pre_grads = products.rows("pre_grad", pre_grad.flatten(1), segments, group.rows.start, **layouts)
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
        self, grads: ExpertWeightGrads, segments: Sequence[Segment], grad: Sequence[Any], inputs: Sequence[Any]
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
        for segment in of_one_bias(segments, self.biases):
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

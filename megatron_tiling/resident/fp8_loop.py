"""The tile loop of an MLP in FP8, as one autograd function over the weights of TransformerEngine's layers.

As in ``tiles/mlp.py`` the forward pass goes by tokens, the backward pass by feature tiles. Quantizers and GEMMs are
TransformerEngine's, whose outputs must be contiguous: gate and up of a tile lie side by side, fc1's rows of both are
copied below one another, and the gradient of fc2's weight is one product at the end, for which the activations of all
tiles are kept in FP8. With current scaling the activation of each step of tokens, and the gradient of each tile, has a
scale of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.distributed import allreduce, gather_along_first_dim, reduce_scatter_along_first_dim
from transformer_engine.pytorch.module.linear import _check_fp8_reduce_and_update
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import prepare_for_saving, restore_from_func_ctx

from megatron_tiling.resident.fp8_operands import (
    Operand,
    Quantizer,
    WeightCopies,
    columns_of,
    columns_to_fill,
    inverse_scale,
    joined,
    known_inverse_scale,
    quantized,
    rows_of,
    same_again,
    wants_amax,
)
from megatron_tiling.tiles.comm import flat
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.mlp_tiles import ActivationBackward, MLPTiles, scale_of
from megatron_tiling.tiles.wgrad import WeightGrad


@dataclass(frozen=True)
class FP8Linear:
    """One of fc1 and fc2 in one micro-batch.

    Args:
        input, grad_output: the layer's quantizers.
        weight: its weight's copies.
        fuse_wgrad: add the weight gradient to ``weight.main_grad`` in place.
        group: the tensor-parallel group, if the layer communicates.
        sequence_parallel: fc1 gathers its input and scatters its gradient, fc2 the other way around.
        save_input: keep the input for the backward pass as it was given, not in FP8.
    """

    input: Quantizer
    grad_output: Quantizer
    weight: WeightCopies
    fuse_wgrad: bool
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    save_input: bool = False

    @property
    def gathers(self) -> bool:
        return self.group is not None and self.sequence_parallel

    def gathered(
        self, quantizer: Quantizer, shard: Tensor | Operand, *, rowwise: bool, columnwise: bool
    ) -> Callable[[], Operand]:
        """Start to gather ``[n/tp, k]``, in FP8; the result waits for ``[n, k]``. Without a gather, quantize only."""
        if not self.gathers:
            if isinstance(shard, Tensor):
                shard = quantized(quantizer, shard, rowwise=rowwise, columnwise=columnwise)
            return lambda: shard
        rows_only = quantizer.supports_only_rowwise_all_gather()
        quantizer = quantizer.copy()
        quantizer.internal = True
        quantizer.set_usage(rowwise=rowwise or rows_only, columnwise=columnwise and not rows_only)
        operand, work = gather_along_first_dim(shard, self.group, async_op=True, quantizer=quantizer)

        def finish() -> Operand:
            if work is not None:
                work.wait()
            operand.update_usage(rowwise_usage=rowwise, columnwise_usage=columnwise)
            return operand

        return finish

    def reduced(self, partial: Tensor, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
        """The sum over ranks, ``[n, k]``, with sequence parallelism ``[n/tp, k]``, and what to wait for."""
        if self.group is None:
            return partial, None
        reduce = reduce_scatter_along_first_dim if self.sequence_parallel else allreduce
        total, work = reduce(partial, self.group, async_op=async_op)
        return total, work


@dataclass(frozen=True, kw_only=True)
class FP8Loop(MLPTiles):
    """How ``fp8_mlp`` runs; beside the arguments of ``MLPTiles``.

    Args:
        fc1, fc2: the layers.
        split_accumulators: of the recipe's products: forward, input gradients, weight gradients.
    """

    fc1: FP8Linear
    fc2: FP8Linear
    split_accumulators: tuple[bool, bool, bool]

    def halves(self, columns: slice) -> list[slice]:
        """fc1's rows of these features: gate's and up's, or one range."""
        halves, features = self.activation.halves, self.parts[-1]
        if columns.stop - columns.start == features:
            return [slice(0, halves * features)]
        offsets = [half * features for half in range(halves)]
        return [slice(offset + columns.start, offset + columns.stop) for offset in offsets]

    def forward(self, weight: Operand, x: Operand, out: Tensor) -> None:
        """``out [n, o] = x [n, k] @ weight [o, k].T``."""
        self._gemm(weight, x, out, False, "TN", self.split_accumulators[0])

    def dgrad(self, weight: Operand, grad: Operand, out: Tensor, accumulate: bool = False) -> None:
        """``out [n, k] (+)= grad [n, o] @ weight [o, k]``."""
        self._gemm(weight, grad, out, accumulate, "NN", self.split_accumulators[1])

    def wgrad(self, x: Operand, grad: Operand, out: Tensor, accumulate: bool) -> None:
        """``out [o, k] (+)= grad [n, o].T @ x [n, k]``."""
        self._gemm(x, grad, out, accumulate, "NT", self.split_accumulators[2])

    def _gemm(self, a: Operand, b: Operand, out: Tensor, accumulate: bool, layout: str, split: bool) -> None:
        options = {"out_dtype": out.dtype, "layout": layout, "use_split_accumulator": split, "grad": layout != "TN"}
        general_gemm(a, b, out=out, accumulate=accumulate, **options)

    def pre_activation(self, x: Operand, weight: Operand, like: Tensor) -> Tensor:
        """``x [n, h]``, fc1's rows of some features ``[halves * width, h]`` -> ``[n, halves * width]``."""
        pre = like.new_empty(x.size()[0], weight.size()[0])
        self.forward(weight, x, pre)
        return pre


def fp8_mlp(
    hidden: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, scale: Tensor | None, loop: FP8Loop
) -> Tensor:
    """``(scale * activation(hidden @ fc1_weight.T + fc1_bias)) @ fc2_weight.T`` in FP8, tile after tile.

    Args:
        hidden: ``[..., h]``; under sequence parallelism the rank's tokens. In all a multiple of 8 tokens.
        fc1_weight: ``[halves * f, h]``, gate above up, in high precision or a quantized tensor.
        fc1_bias: ``[halves * f]`` or ``None``.
        fc2_weight: ``[h_out, f]``, as ``fc1_weight``.
        scale: a factor for every token, or ``None``.
        loop: the tiles, the layers and the options.

    Returns:
        ``[..., h_out]``, reduced over tensor-parallel ranks; under sequence parallelism the rank's tokens.
    """
    output: Tensor = _FP8MLP.apply(hidden, fc1_weight, fc1_bias, fc2_weight, scale, loop, torch.is_grad_enabled())
    return output


class _FP8MLP(torch.autograd.Function):
    """The tile loop. ``q`` marks FP8: rows, columns, or both, as the products to come want them.

    Tokens ``n`` = all dimensions but the last, in steps of ``m``; ``f_i``: features of tile i, in fc1 of each half.

    ==========  ==================================================  ===================================================
    input       x ``[n/tp, h]``                                     qx ``[n, h]``, quantized, then gathered
    fc1         qx_j ``[m, h]``, qU ``[halves * f, h]``             p_j ``[m, f]`` = x_j U^T; kept tiles of all tokens
    activation  p_j, b ``[f]``, s_j ``[m]``                         a_j ``[m, f]`` = s_j * act(p_j + b), then qa_j
    fc2         qa_j, qW ``[h_out, f]``                             y_j ``[m, h_out]`` = a_j W^T
    ----------  --------------------------------------------------  ---------------------------------------------------
    fc2 dgrad   qdy ``[n, h_out]``, qW_i ``[h_out, f_i]``           da_i ``[n, f_i]`` = dy W_i
    fc1         qx ``[n, h]``, qU_i ``[f_i, h]``                    p_i ``[n, f_i]`` = x U_i^T, unless kept
    activation  da_i, p_i, b_i, s                                   p_i := dp_i, da_i := a_i in place, then qdp_i, qa_i
    fc1 dgrad   qdp_i, qU_i                                         dx ``[n, h]`` = sum over i of dp_i U_i
    fc1 wgrad   qdp_i, qx                                           dU_i ``[f_i, h]`` = dp_i^T x
    fc2 wgrad   qdy, all qa_i                                       dW ``[h_out, f]`` = dy^T a, at the end
    ==========  ==================================================  ===================================================

    Kept tiles come last in the backward pass, and each is freed once its gradient is in FP8. The reduction of dx starts
    after the last dgrad and runs under the wgrads that follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        scale: Tensor | None,
        loop: FP8Loop,
        grad_enabled: bool,
    ) -> Tensor:
        fc1, fc2 = loop.fc1, loop.fc2
        records = grad_enabled and any(ctx.needs_input_grad)
        needs_wgrad = records and ctx.needs_input_grad[1]
        recomputes = records and loop.keep < len(loop.tiles)
        rows_only = fc1.gathers and fc1.input.supports_only_rowwise_all_gather()
        columnwise = needs_wgrad and not fc1.save_input and not rows_only
        shard = quantized(fc1.input, flat(hidden), rowwise=True, columnwise=columnwise)
        x = fc1.gathered(fc1.input, shard, rowwise=True, columnwise=False)()
        keep = loop.keep if records else 0
        rest, kept = slice(loop.parts[keep], loop.parts[-1]), []
        for tile in loop.tiles[:keep]:
            kept.append(loop.pre_activation(x, fc1.weight.rows(fc1_weight, loop.halves(tile)), hidden))
        rest_weight = fc1.weight.rows(fc1_weight, loop.halves(rest)) if keep < len(loop.tiles) else None
        fc2_rows = fc2.weight.rows(fc2_weight, [slice(0, fc2_weight.shape[0])])
        y = hidden.new_empty(x.size()[0], fc2_weight.shape[0])
        steps, inverses = loop.token_steps(x.size()[0]), []
        amaxes = _amaxes(fc2.input, hidden, len(steps))
        halves_of_kept, bias = [loop.activation.halved(pre) for pre in kept], loop.activation.bias_of(fc1_bias)
        for step, amax in zip(steps, amaxes, strict=True):
            parts = [pre[:, step] for pre in halves_of_kept]
            if rest_weight is not None:
                parts.append(loop.activation.halved(loop.pre_activation(rows_of(x, step), rest_weight, hidden)))
            activated = hidden.new_empty(step.stop - step.start, loop.parts[-1])
            loop.activation.forward(parts, bias, scale_of(scale, step), activated, amax)
            del parts
            operand = quantized(fc2.input, activated, rowwise=True, amax=amax)
            inverses.append(inverse_scale(operand))
            loop.forward(fc2_rows, operand, y[step])
            del activated, operand  # before the next ones are made, or there would be two of each
        if records:
            ctx.loop, ctx.activation_quantizer = loop, same_again(fc2.input, inverses)
            ctx.updates_amax = _check_fp8_reduce_and_update()  # as TransformerEngine's first module does for all
            # Parameters carry main_grad, which saved tensors may lose.
            ctx.fc1_param = fc1_weight if ctx.needs_input_grad[1] else None
            ctx.fc2_param = fc2_weight if ctx.needs_input_grad[3] else None
            saved = hidden if fc1.save_input else shard
            if not (needs_wgrad or recomputes):
                saved = None
            elif not fc1.save_input:
                shard.update_usage(rowwise_usage=recomputes or rows_only, columnwise_usage=columnwise)
            tensors, ctx.tensor_objects = prepare_for_saving(saved, fc1_weight, fc1_bias, fc2_weight, scale, *kept)
            ctx.save_for_backward(*tensors)
        output = fc2.reduced(y)[0]
        return output.view(-1, *hidden.shape[1:-1], output.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.tensor_objects is None:
            raise RuntimeError("a second backward pass through an MLP in FP8: leave retain_graph=True out")
        gradients = _Backward(ctx, grad_output).run()
        if ctx.updates_amax:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return gradients


class _Backward:
    """One backward pass of ``_FP8MLP``: what its steps share."""

    def __init__(self, ctx: Any, grad_output: Tensor) -> None:
        self.ctx, self.like = ctx, grad_output
        self.loop: FP8Loop = ctx.loop
        self.needs_dgrad, self.needs_fc1, needs_bias, self.needs_fc2, needs_scale, *_ = ctx.needs_input_grad
        self.needs_activation_grad = self.needs_dgrad or self.needs_fc1 or needs_bias or needs_scale
        saved, self.fc1_weight, fc1_bias, self.fc2_weight, scale, *self.kept = restore_from_func_ctx(ctx)
        fc1, fc2 = self.loop.fc1, self.loop.fc2
        if saved is not None:
            saved = flat(saved) if isinstance(saved, Tensor) else saved
            recomputes = len(self.kept) < len(self.loop.tiles)
            self.gathering = fc1.gathered(fc1.input, saved, rowwise=recomputes, columnwise=self.needs_fc1)
        dy = flat(grad_output).contiguous()
        self.dy = fc2.gathered(fc2.grad_output, dy, rowwise=True, columnwise=self.needs_fc2)()
        self.activations: list[Operand] = [None] * len(self.loop.tiles)
        self.activation_inverse = known_inverse_scale(ctx.activation_quantizer)
        needs = self.needs_activation_grad, needs_bias, needs_scale
        self.activation = ActivationBackward(self.loop, fc1_bias, scale, *needs)
        self.amaxes = _amaxes(fc1.grad_output, grad_output, len(self.loop.tiles))
        self.dgrad: Tensor | None = None
        self.reducing: dist.Work | None = None

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of ``_FP8MLP``."""
        kept = len(self.kept)
        order = [*range(kept, len(self.loop.tiles)), *range(kept)]
        for index in order:
            self._through_tile(index, is_last=index == order[-1])
        if self.needs_fc2:
            gradient, self.activations = self.fc2_grad, [joined(self.activations)]
            self.loop.wgrad(self.activations[0], self.dy, gradient.tensor, accumulate=gradient.fused)
        if self.reducing is not None:
            self.reducing.wait()
        return (
            None if self.dgrad is None else self.dgrad.view(-1, *self.like.shape[1:-1], self.dgrad.shape[1]),
            self.fc1_grad.result() if self.needs_fc1 else None,
            self.activation.bias_grad,
            self.fc2_grad.result() if self.needs_fc2 else None,
            self.activation.scale_grad,
            None,
            None,
        )

    def _through_tile(self, index: int, is_last: bool) -> None:
        tile, amax = self.loop.tiles[index], self.amaxes[index]
        halves, weight = self.loop.halves(tile), None
        pre = self.kept[index] if index < len(self.kept) else None
        grad = self.like.new_empty(self.dy.size()[0], tile.stop - tile.start)  # of the activation
        if self.needs_activation_grad:
            self.loop.dgrad(self._fc2_columns(tile), self.dy, grad)
        if pre is None:  # after a product that a gather of the input runs under
            weight = self._fc1_rows(halves, rowwise=True)
            pre = self.loop.pre_activation(self.input, weight, self.like)
        quantizer, inverse, fp8 = self.ctx.activation_quantizer, self.activation_inverse, None
        if self.needs_fc2 and self.needs_activation_grad and inverse is not None:
            self.activations[index], fp8 = columns_to_fill(quantizer, inverse, *grad.shape)
        self.activation.through_tile(tile, self.loop.activation.halved(pre), grad, amax, fp8)
        if self.needs_fc2 and fp8 is None:
            self.activations[index] = quantized(quantizer, grad, columnwise=True)
        del grad  # before more is made; so are those below
        if not (self.needs_dgrad or self.needs_fc1):
            return
        layouts = {"rowwise": self.needs_dgrad, "columnwise": self.needs_fc1}
        pre_grad = quantized(self.loop.fc1.grad_output, pre, amax=amax, **layouts)
        pre.untyped_storage().resize_(0)  # whoever holds it
        if self.needs_dgrad:
            self._add_dgrad(weight or self._fc1_rows(halves, rowwise=False), pre_grad)
            del weight
            if is_last:
                assert self.dgrad is not None
                self.dgrad, self.reducing = self.loop.fc1.reduced(self.dgrad.to(self.like.dtype), async_op=True)
        if self.needs_fc1:
            gradient, width = self.fc1_grad, pre_grad.size()[1] // len(halves)
            for half, rows in enumerate(halves):
                part = columns_of(pre_grad, slice(half * width, (half + 1) * width))
                self.loop.wgrad(self.input, part, gradient.tensor[rows], accumulate=gradient.fused)

    def _fc1_rows(self, halves: list[slice], rowwise: bool) -> Operand:
        return self.loop.fc1.weight.rows(self.fc1_weight, halves, rowwise=rowwise, columnwise=self.needs_dgrad)

    def _fc2_columns(self, tile: slice) -> Operand:
        """Those of one tile alone where others are recomputed; else cut from all, which takes fewer launches."""
        copies = self.loop.fc2.weight
        if len(self.kept) < len(self.loop.tiles) and copies.makes_columns(self.fc2_weight):
            return copies.columns(self.fc2_weight, tile)
        return columns_of(self.all_fc2_columns, tile)

    def _add_dgrad(self, weight: Operand, pre_grad: Operand) -> None:
        first = self.dgrad is None
        if self.dgrad is None:
            dtype = torch.float32 if self.loop.fp32_accumulate else self.like.dtype
            self.dgrad = self.like.new_empty(self.dy.size()[0], self.fc1_weight.shape[1], dtype=dtype)
        self.loop.dgrad(weight, pre_grad, self.dgrad, accumulate=not first)

    @cached_property
    def all_fc2_columns(self) -> Operand:
        everything = [slice(0, self.fc2_weight.shape[0])]
        return self.loop.fc2.weight.rows(self.fc2_weight, everything, rowwise=False, columnwise=True)

    @cached_property
    def input(self) -> Operand:
        """``[n, h]``, once the gather has ended."""
        return self.gathering()

    @cached_property
    def fc1_grad(self) -> WeightGrad:
        return WeightGrad(self.ctx.fc1_param, self.loop.fc1.fuse_wgrad)

    @cached_property
    def fc2_grad(self) -> WeightGrad:
        return WeightGrad(self.ctx.fc2_param, self.loop.fc2.fuse_wgrad)


def _amaxes(quantizer: Quantizer, like: Tensor, count: int) -> list[Tensor | None]:
    """Where the activation's kernels put the largest values of what ``quantizer`` is given, if that helps it."""
    amaxes = like.new_zeros(count, 1, dtype=torch.float32) if wants_amax(quantizer) else None
    return [None] * count if amaxes is None else list(amaxes)

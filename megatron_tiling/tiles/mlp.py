"""The tile loop of a whole MLP whose weights are resident, as one autograd function over the dense weights.

fc1 -> activation -> fc2 in T tiles: the intermediate never exists whole. The forward pass goes by tokens: a T-th of
them with all features, the same bytes as all tokens of a feature tile, and each output is one product, as in the
dense MLP. The backward pass goes by feature tiles, so that every slice of a weight gradient is written once: tile i
of fc1, the activation, tile i of fc2. It recomputes the fc1 product of tiles whose pre-activation was not kept, and
never fc2's. Tiles that keep theirs share one buffer, and their fc1 products are one GEMM in each direction.

Low-rank adapters beside fc1 and fc2 (LoRA) go along: their wide factors tile by tile, as further weights.

Depends on torch alone.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.mlp_tiles import NO_SECOND_PASS, ActivationBackward, MLPTiles, scale_of
from megatron_tiling.tiles.spans import Span, padded
from megatron_tiling.tiles.wgrad import WHOLE, WeightGrad


@dataclass(frozen=True)
class MLPLoop(MLPTiles):
    """How ``tiled_mlp`` runs; beside the arguments of ``MLPTiles``.

    Args:
        fuse_fc1_wgrad, fuse_fc2_wgrad: add the weight gradient to ``weight.main_grad`` in place, and give autograd
            none.
        comm: collectives of fc1 with tensor parallelism.
        fuse_up_wgrad, fuse_down_wgrad: the same for the factors of adapters.
        saves_weights: as autograd does; else the parameters are read again in the backward pass, where an engine that
            swaps or frees them in between has put them back.
    """

    fuse_fc1_wgrad: bool = False
    fuse_fc2_wgrad: bool = False
    comm: ColumnComm | None = None
    fuse_up_wgrad: bool = False
    fuse_down_wgrad: bool = False
    saves_weights: bool = True

    @property
    def fuses(self) -> tuple[bool, ...]:
        """Of fc1, fc2, and the factors of adapters beside them."""
        return self.fuse_fc1_wgrad, self.fuse_fc2_wgrad, self.fuse_up_wgrad, self.fuse_down_wgrad

    @property
    def kept(self) -> list[Span]:
        """The kept tiles, if any: fc1 computes them at once."""
        return [self._span(self.tiles[: self.keep], kept=True)] if self.keep else []

    @property
    def forward_spans(self) -> list[Span]:
        """What fc1 computes at once in the forward pass: the kept tiles, and all others."""
        recomputed = self.tiles[self.keep :]
        return self.kept + ([self._span(recomputed, kept=False)] if recomputed else [])

    @property
    def backward_spans(self) -> list[Span]:
        """Tile by tile those that are recomputed, then the kept ones at once."""
        return [self._span([tile], kept=False) for tile in self.tiles[self.keep :]] + self.kept

    def _span(self, tiles: list[slice], kept: bool) -> Span:
        return Span(tiles, self.activation.halves, self.parts[-1], kept)


class LowRank(NamedTuple):
    """Adapters of rank r. What their narrow ends do, scaling and collectives included, is up to the caller.

    Attributes:
        low: ``[..., r]``, added to fc1's product as ``low @ up.T``; of all tokens.
        up: ``[halves * f, r]``.
        down: ``[r, f]``, multiplied with the activation as fc2's weight is.
    """

    low: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None


def tiled_mlp(
    hidden: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, scale: Tensor | None, loop: MLPLoop
) -> Tensor:
    """``(scale * activation(hidden @ fc1_weight.T + fc1_bias)) @ fc2_weight.T``, tile after tile.

    Args:
        hidden: ``[..., h]``; under sequence parallelism the rank's tokens.
        fc1_weight: ``[halves * f, h]``, gate above up.
        fc1_bias: ``[halves * f]`` or ``None``.
        fc2_weight: ``[h_out, f]``.
        scale: a factor for every token, or ``None``.
        loop: the tiles and the options.

    Returns:
        ``[..., h_out]``, not yet reduced over tensor-parallel ranks; under sequence parallelism of all tokens.
    """
    return adapted_mlp(hidden, fc1_weight, fc1_bias, fc2_weight, scale, LowRank(), loop)[0]


def adapted_mlp(
    hidden: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    scale: Tensor | None,
    adapters: LowRank,
    loop: MLPLoop,
) -> tuple[Tensor, Tensor | None]:
    """``tiled_mlp`` with adapters: its output, and the activation's product with ``adapters.down``, ``[..., r]``."""
    operands = (hidden, fc1_weight, fc1_bias, fc2_weight, scale, *adapters, loop, torch.is_grad_enabled())
    output, low = _TiledMLP.apply(*operands)
    return output, low


class _TiledMLP(torch.autograd.Function):
    """The tile loop.

    Tokens ``n`` = all dimensions but the last, in steps of ``m``; ``f_i``: features of tile i, in fc1 those of gate and
    of up if gated.

    ==========  ==================================================  ===================================================
    fc1         x_j ``[m, h]``, U ``[f, h]``                        p_j ``[m, f]`` = x_j U^T; kept columns at once
    activation  p_j, b ``[f]``, s_j ``[m]``                         a_j ``[m, f]`` = s_j * act(p_j + b)
    fc2         a_j, W ``[h_out, f]``                               y_j ``[m, h_out]`` = a_j W^T
    ----------  --------------------------------------------------  ---------------------------------------------------
    fc2 dgrad   dy ``[n, h_out]``, W_i ``[h_out, f_i]``             da_i ``[n, f_i]`` = dy W_i
    fc1         x ``[n, h]``, U_i ``[f_i, h]``                      p_i ``[n, f_i]`` = x U_i^T, unless kept
    activation  da_i, p_i, b_i, s                                   p_i := dp_i, da_i := a_i, both in place
    fc1 dgrad   dp_i, U_i                                           dx ``[n, h]`` = sum over i of dp_i U_i
    fc2 wgrad   dy, a_i                                             dW_i ``[h_out, f_i]`` = dy^T a_i
    fc1 wgrad   dp_i, x                                             dU_i ``[f_i, h]`` = dp_i^T x
    ==========  ==================================================  ===================================================

    An adapter adds l_j B^T to p_j and gives a_j A^T; then dz A_i adds to da_i, and the sum over i of dp_i B_i is dl.
    Kept tiles come last in the backward pass: fc2 dgrad, activation and fc2 wgrad of each, then one fc1 dgrad and one
    fc1 wgrad. The reduction of dx starts after the last dgrad and runs under the wgrads that follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        scale: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        down: Tensor | None,
        loop: MLPLoop,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor | None]:
        whole = hidden
        if loop.comm is not None and loop.comm.sequence_parallel:
            whole = loop.comm.gather(hidden)[0]
        weights = [fc2_weight] if down is None else [fc2_weight, down]
        outputs = [whole.new_empty(*whole.shape[:-1], weight.shape[0]) for weight in weights]
        factors = [(flat(whole), fc1_weight)]
        if low is not None and up is not None:
            factors.append((flat(low), up))
        kept = None
        records = grad_enabled and any(ctx.needs_input_grad)
        for span in loop.kept if records else ():
            kept = span.fc1(factors)
        spans = loop.forward_spans
        for step in loop.token_steps(factors[0][0].shape[0]):
            activated = whole.new_empty(step.stop - step.start, fc2_weight.shape[1])
            parts = [
                kept[:, step]
                if kept is not None and span.kept
                else span.fc1([(x[step], weight) for x, weight in factors])
                for span in spans
            ]
            loop.activation.forward(parts, loop.activation.bias_of(fc1_bias), scale_of(scale, step), activated)
            del parts
            for output, weight in zip(outputs, weights, strict=True):
                gemm_into(flat(output)[step], activated, weight.t(), accumulate=False)
            del activated  # before the next one is made, or there would be two
        if records:
            needs_input = ctx.needs_input_grad[1] or loop.keep < len(loop.tiles)
            ctx.loop, ctx.kept_is_intact = loop, True
            ctx.params = fc1_weight, fc2_weight, up, down  # they carry main_grad, which saved tensors may lose
            saved = (fc1_weight, fc2_weight) if loop.saves_weights else (None, None)
            ctx.save_for_backward(hidden if needs_input else None, fc1_bias, scale, kept, low, up, down, *saved)
        return outputs[0], None if down is None else outputs[1]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor, low_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Backward(ctx, grad_output, low_grad).run()


class _Backward:
    """One backward pass of ``_TiledMLP``: what its steps share."""

    def __init__(self, ctx: Any, grad_output: Tensor, low_grad: Tensor | None) -> None:
        self.ctx = ctx
        self.loop: MLPLoop = ctx.loop
        needs = ctx.needs_input_grad
        self.needs_dgrad, self.needs_fc1, _, self.needs_fc2, _ = needs[:5]
        self.needs_low, self.needs_up, self.needs_down = needs[5:8]
        self.needs_activation_grad = any((*needs[:3], *needs[4:7]))
        self.hidden, self.fc1_bias, self.scale, self.kept, self.low, self.up, self.down, *weights = ctx.saved_tensors
        self.fc1_weight, self.fc2_weight = weights if self.loop.saves_weights else ctx.params[:2]
        self.fc1_grad, self.fc2_grad, self.up_grad, self.down_grad = map(WeightGrad, ctx.params, self.loop.fuses)
        if not ctx.kept_is_intact:  # a second pass with retain_graph=True: the first one wrote its gradients there
            self.kept = None
        ctx.kept_is_intact = False
        self.token_shape = grad_output.shape[:-1]
        self.dy = flat(grad_output).contiguous()
        self.dz = None if low_grad is None else flat(low_grad).contiguous()
        self.gathering: dist.Work | None = None
        self.dgrad: Tensor | None = None
        self.low_grad: Tensor | None = None
        needed = self.needs_activation_grad, needs[2], needs[4]
        self.activation = ActivationBackward(self.loop, self.fc1_bias, self.scale, *needed)

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of ``_TiledMLP``."""
        self._start_gather()
        spans = self.loop.backward_spans
        reducing = None
        for span in spans:
            pre_grad, activated = self._through_activation(span)
            if self.needs_dgrad:
                self.dgrad = self._add_dgrad(self.dgrad, span, pre_grad, self.fc1_weight)
                if span is spans[-1]:
                    reducing = self._reduce_dgrad()
            if self.needs_low:
                self.low_grad = self._add_dgrad(self.low_grad, span, pre_grad, self.up)
            if activated is not None:
                self._add_fc2_wgrads(span.columns, activated)
            if self.needs_fc1:
                span.wgrad(self.fc1_grad.tensor, pre_grad, self.input, accumulate=self.fc1_grad.fused)
            if self.needs_up:
                span.wgrad(self.up_grad.tensor, pre_grad, flat(self.low), accumulate=self.up_grad.fused)
            del pre_grad, activated  # before the next ones are made, or there would be two of each
        if reducing is not None:
            reducing.wait()
        return (
            self.dgrad,
            self.fc1_grad.result() if self.needs_fc1 else None,
            self.activation.bias_grad,
            self.fc2_grad.result() if self.needs_fc2 else None,
            self.activation.scale_grad,
            None if self.low_grad is None else self.low_grad.to(self.dy.dtype),
            self.up_grad.result() if self.needs_up else None,
            self.down_grad.result() if self.needs_down else None,
            None,
            None,
        )

    def _through_activation(self, span: Span) -> tuple[Tensor, Tensor | None]:
        """The gradient of a span's pre-activation, in its place, and the activation if fc2's wgrad is still to be done.

        It is done here for kept tiles, so that activations of two of them never exist, nor one beside dx.
        """
        pre = self.kept.detach().data if span.kept and self.kept is not None else None
        for tile in span.tiles:
            width = tile.stop - tile.start
            activated = scratch(self.dy, self.dy.shape[0], padded(width))[:, :width]  # its gradient at first
            if self.needs_activation_grad:
                gemm_into(activated, self.dy, self.fc2_weight[:, tile], accumulate=False)
                if self.dz is not None:
                    gemm_into(activated, self.dz, self.down[:, tile], accumulate=True)
            if pre is None:  # after a product that a gather of the input runs under
                low = [] if self.low is None else [(flat(self.low), self.up)]
                pre = span.fc1([(self.input, self.fc1_weight), *low])
            self.activation.through_tile(tile, span.of_tile(pre, tile), activated)
            if not span.kept:
                return pre, activated
            self._add_fc2_wgrads(tile, activated)
            del activated
        assert pre is not None
        return pre, None

    def _add_fc2_wgrads(self, columns: slice, activated: Tensor) -> None:
        if self.needs_fc2:
            self.fc2_grad.add(WHOLE, columns, self.dy, activated)
        if self.needs_down and self.dz is not None:
            self.down_grad.add(WHOLE, columns, self.dz, activated)

    def _add_dgrad(self, total: Tensor | None, span: Span, pre_grad: Tensor, weight: Tensor) -> Tensor:
        """What a span gives to the gradient of the input of fc1, or of its adapter, added to what others gave."""
        accumulate = total is not None
        if total is None:
            widen = self.loop.fp32_accumulate and not span.whole and self.dy.dtype.itemsize < 4
            dtype = torch.float32 if widen else self.dy.dtype
            total = self.dy.new_empty(*self.token_shape, weight.shape[1], dtype=dtype)
        span.dgrad(flat(total), pre_grad, weight, accumulate=accumulate)
        return total

    def _reduce_dgrad(self) -> dist.Work | None:
        assert self.dgrad is not None
        self.dgrad = self.dgrad.to(self.dy.dtype)
        if self.loop.comm is None:
            return None
        self.dgrad, work = self.loop.comm.reduce(self.dgrad)
        return work

    def _start_gather(self) -> None:
        comm = self.loop.comm
        recomputes = self.kept is None or self.loop.keep < len(self.loop.tiles)
        if not self.needs_fc1 and not recomputes:
            return
        if self.hidden is None:
            raise RuntimeError(NO_SECOND_PASS)
        if comm is not None and comm.sequence_parallel:
            self.hidden, self.gathering = comm.gather(self.hidden, async_op=True)

    @cached_property
    def input(self) -> Tensor:
        """``[n, h]``, once the gather has ended."""
        if self.gathering is not None:
            self.gathering.wait()
        return flat(self.hidden)

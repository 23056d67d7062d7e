"""An MLP whose weights are resident, by steps of tokens, tensor-parallel communication included.

All features of the shard make one product in each step; what a step holds is what bounds memory. While a step computes,
the next one's tokens arrive and the sums of the one before go to their ranks. Depends on torch alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.mlp_tiles import NO_SECOND_PASS
from megatron_tiling.tiles.step_comm import Step, StepComm, Transport, cut, few_steps, start_steps
from megatron_tiling.tiles.wgrad import WHOLE, WeightGrad

DY, X = 0, 1  # sources of a backward pass


@dataclass(frozen=True)
class SteppedLoop:
    """How ``stepped_mlp`` runs.

    Args:
        activation: between fc1 and fc2.
        steps: into so many the tokens are cut, at most.
        keeps: pre-activations of all tokens stay for the backward pass; else each step's are computed again.
        comm: of fc1; fc2's sums go over the same ranks.
        fuse_fc1_wgrad, fuse_fc2_wgrad: add the weight gradient to ``weight.main_grad`` in place.
        fp32_accumulate: weight gradients are summed over steps in float32, if they are not fused.
        transport: what bytes move with.
    """

    activation: Activation
    steps: int
    keeps: bool
    comm: ColumnComm
    fuse_fc1_wgrad: bool = False
    fuse_fc2_wgrad: bool = False
    fp32_accumulate: bool = False
    transport: Transport = "auto"

    def cut(self, source: Tensor) -> list[Step]:
        """The steps of a pass over ``source [rows, ..., features]``."""
        return cut(source.shape[0], prod(source.shape[1:-1]), self.comm.shards, self.steps)

    def start(self, sources: Sequence[Tensor], out: Tensor | None) -> StepComm:
        """Begin a pass."""
        return start_steps(self.comm, sources, out, self.transport)


def stepped_mlp(
    hidden: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, loop: SteppedLoop
) -> Tensor:
    """``activation(hidden @ fc1_weight.T + fc1_bias) @ fc2_weight.T``, summed over tensor-parallel ranks.

    Args:
        hidden: ``[s, ..., h]``, at least one token; ``[s/tp, ..., h]`` under sequence parallelism.
        fc1_weight: ``[halves * f, h]``, gate above up.
        fc1_bias: ``[halves * f]`` or ``None``.
        fc2_weight: ``[h_out, f]``.
        loop: the steps and the options.

    Returns:
        ``[s, ..., h_out]``; under sequence parallelism this rank's ``[s/tp, ..., h_out]``.
    """
    output: Tensor = _SteppedMLP.apply(hidden, fc1_weight, fc1_bias, fc2_weight, loop, torch.is_grad_enabled())
    return output


class _SteppedMLP(torch.autograd.Function):
    """The loop. A step's ``m`` tokens are of all ranks, in the order of the ranks; ``n`` are the tokens of all steps.

    ===========  ===========================================  =================================================
    beside it    x_j+1 ``[m, h]`` arrives                     y_j-1 goes to its ranks, and is added up there
    fc1          x_j, U ``[halves * f, h]``                   p_j ``[m, halves * f]`` = x_j U^T
    activation   p_j, b                                       a_j ``[m, f]`` = act(p_j + b)
    fc2          a_j, W ``[h_out, f]``                        y_j ``[m, h_out]`` = a_j W^T, of this rank's features
    -----------  -------------------------------------------  -------------------------------------------------
    beside it    dy_j+1 ``[m, h_out]`` and x arrive           dx_j-1 goes to its ranks, and is added up there
    fc1          x_j, U                                       p_j, unless kept
    fc2 dgrad    dy_j, W                                      da_j ``[m, f]`` = dy_j W
    activation   da_j, p_j, b                                 p_j := dp_j, da_j := a_j, both in place
    fc1 dgrad    dp_j, U                                      dx_j ``[m, h]`` = dp_j U
    fc2 wgrad    dy, a                                        dW ``[h_out, f]`` = dy^T a
    fc1 wgrad    dp, x                                        dU ``[halves * f, h]`` = dp^T x
    ===========  ===========================================  =================================================

    With kept pre-activations both wgrads are one product over all tokens, under which dx goes: one step after the first
    is enough then. Else each step adds to the wgrads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        loop: SteppedLoop,
        grad_enabled: bool,
    ) -> Tensor:
        records = grad_enabled and any(ctx.needs_input_grad)
        steps, activation = loop.cut(hidden), loop.activation
        output = hidden.new_empty(*hidden.shape[:-1], fc2_weight.shape[0])
        keeps = records and loop.keeps
        kept = scratch(hidden, steps[-1].tokens.stop, fc1_weight.shape[0]) if keeps else None
        with loop.start([hidden], output) as comm:
            arriving = comm.fetch(0, steps[0])
            for index, step in enumerate(steps):
                x, arrived = arriving
                if index + 1 < len(steps):
                    arriving = comm.fetch(0, steps[index + 1])
                arrived()
                pre = scratch(hidden, x.shape[0], fc1_weight.shape[0]) if kept is None else kept[step.tokens]
                gemm_into(pre, x, fc1_weight.t(), accumulate=False)
                activated = scratch(hidden, x.shape[0], fc2_weight.shape[1])
                activation.forward([activation.halved(pre)], activation.bias_of(fc1_bias), None, activated)
                del pre, x  # before the next ones are made
                partial = comm.partial(step)
                gemm_into(partial, activated, fc2_weight.t(), accumulate=False)
                del activated
                comm.push(partial, step)
                del partial
        if records:
            ctx.loop, ctx.kept_is_intact = loop, True
            ctx.params = fc1_weight, fc2_weight  # they carry main_grad, which saved tensors may lose
            needs_input = ctx.needs_input_grad[1] or kept is None
            ctx.save_for_backward(hidden if needs_input else None, fc1_bias, kept, fc1_weight, fc2_weight)
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _Backward(ctx, grad_output).run()


class _Backward:
    """One backward pass of ``_SteppedMLP``: what its steps share."""

    def __init__(self, ctx: Any, grad_output: Tensor) -> None:
        self.loop: SteppedLoop = ctx.loop
        self.needs_dgrad, self.needs_fc1, self.needs_bias, self.needs_fc2 = ctx.needs_input_grad[:4]
        self.needs_activation_grad = self.needs_dgrad or self.needs_fc1 or self.needs_bias
        self.hidden, self.bias, kept, self.fc1_weight, self.fc2_weight = ctx.saved_tensors
        self.kept = kept.data if kept is not None and ctx.kept_is_intact else None
        ctx.kept_is_intact = False  # the gradients go there
        self.needs_x = self.needs_fc1 or self.kept is None
        if self.needs_x and self.hidden is None:
            raise RuntimeError(NO_SECOND_PASS)
        self.grad_output = grad_output.contiguous()
        fuse = self.loop.fuse_fc1_wgrad, self.loop.fuse_fc2_wgrad
        wide = self.loop.fp32_accumulate and self.kept is None
        self.fc1_grad, self.fc2_grad = (WeightGrad(*pair, wide=wide) for pair in zip(ctx.params, fuse, strict=True))
        self.bias_grad: Tensor | None = None
        self.dgrad: Tensor | None = None
        if self.needs_dgrad:
            self.dgrad = self.grad_output.new_empty(*self.grad_output.shape[:-1], self.fc1_weight.shape[1])
        self.steps = self.loop.cut(self.grad_output)
        sources = [self.grad_output, self.hidden] if self.needs_x else [self.grad_output]
        self.comm = self.loop.start(sources, self.dgrad)

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of ``_SteppedMLP``."""
        with self.comm:
            if self.kept is None:
                self._run_in_steps()
            else:
                self._run_kept(self.kept)
        return (
            self.dgrad,
            self.fc1_grad.result() if self.needs_fc1 else None,
            None if self.bias_grad is None or self.bias is None else self.bias_grad.to(self.bias.dtype).flatten(),
            self.fc2_grad.result() if self.needs_fc2 else None,
            None,
            None,
        )

    def _run_kept(self, kept: Tensor) -> None:
        """Both wgrads at the end, over all tokens; what they read arrives in its place."""
        steps = few_steps(self.steps)
        tokens = steps[-1].tokens.stop
        dy = self.comm.whole(DY, lambda: self.grad_output.new_empty(tokens, self.fc2_weight.shape[0]))
        x = self.comm.whole(X, lambda: self._memory_for_input(tokens)) if self.needs_fc1 else None
        activated = scratch(dy, tokens, self.fc2_weight.shape[1])
        of_x = []
        _, arrived = self.comm.fetch(DY, steps[0], dy[steps[0].tokens])
        for index, step in enumerate(steps):
            ready = arrived
            if index + 1 < len(steps):
                following = steps[index + 1]
                _, arrived = self.comm.fetch(DY, following, dy[following.tokens])
            if x is not None:
                of_x.append(self.comm.fetch(X, step, x[step.tokens])[1])
            ready()
            self._through_activation(dy[step.tokens], kept[step.tokens], activated[step.tokens])
            self._push_dgrad(step, kept[step.tokens])
        self._add_fc2_wgrad(dy, activated, accumulate=False)
        del activated
        for ready in of_x:
            ready()
        if x is not None:
            self.fc1_grad.add(WHOLE, WHOLE, kept, x)

    def _run_in_steps(self) -> None:
        arriving = self._fetched(self.steps[0])
        for index, step in enumerate(self.steps):
            (dy, dy_arrived), (x, x_arrived) = arriving
            if index + 1 < len(self.steps):
                arriving = self._fetched(self.steps[index + 1])
            x_arrived()
            pre = scratch(dy, dy.shape[0], self.fc1_weight.shape[0])
            gemm_into(pre, x, self.fc1_weight.t(), accumulate=False)
            activated = scratch(dy, dy.shape[0], self.fc2_weight.shape[1])
            dy_arrived()
            self._through_activation(dy, pre, activated)
            self._push_dgrad(step, pre)
            self._add_fc2_wgrad(dy, activated, accumulate=index > 0)
            if self.needs_fc1:
                self.fc1_grad.add(WHOLE, WHOLE, pre, x, accumulate=index > 0)
            del dy, x, pre, activated  # before the next ones are made

    def _fetched(self, step: Step) -> tuple[Any, Any]:
        x = self.comm.fetch(X, step)
        return self.comm.fetch(DY, step), x

    def _memory_for_input(self, tokens: int) -> Tensor:
        """``[tokens, h]``, of memory that other layers gather into as well."""
        return self.loop.comm.gather_buffer((tokens, self.hidden.shape[-1]), self.hidden.dtype)

    def _through_activation(self, dy: Tensor, pre: Tensor, activated: Tensor) -> None:
        """In place: ``pre`` becomes its gradient, ``activated`` is filled."""
        activation = self.loop.activation
        halves, bias = activation.halved(pre), activation.bias_of(self.bias)
        if not self.needs_activation_grad:
            activation.forward([halves], bias, None, activated)
            return
        gemm_into(activated, dy, self.fc2_weight, accumulate=False)
        bias_grad, _ = activation.backward(halves, bias, None, activated, bias_grad=self.needs_bias, scale_grad=False)
        if bias_grad is not None:
            wide = bias_grad.to(torch.promote_types(bias_grad.dtype, torch.float32))
            self.bias_grad = wide if self.bias_grad is None else self.bias_grad.add_(wide)

    def _push_dgrad(self, step: Step, pre_grad: Tensor) -> None:
        if self.needs_dgrad:
            partial = self.comm.partial(step)
            gemm_into(partial, pre_grad, self.fc1_weight, accumulate=False)
            self.comm.push(partial, step)

    def _add_fc2_wgrad(self, dy: Tensor, activated: Tensor, accumulate: bool) -> None:
        if self.needs_fc2:
            self.fc2_grad.add(WHOLE, WHOLE, dy, activated, accumulate=accumulate)

"""A column or row layer whose weight is resident, by steps of tokens, tensor-parallel communication included.

What dense layers do not hide runs behind products: the gather of a column layer's input, the sum over ranks of a row
layer's output, and the gather of that one's gradient. Tokens stay in their order, for what others do with them all.
A step is all features of the shard: tiles are for calls that do not go by steps. Depends on torch alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.device import on_gpu
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import gemm_into
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.linear import TiledLinearFunction, TileLoop, save_for_backward
from megatron_tiling.tiles.step_comm import Own, Step, StepComm, Transport, cut, places, start_steps
from megatron_tiling.tiles.wgrad import WHOLE, WeightGrad


@dataclass(frozen=True)
class LinearSteps:
    """How a layer goes by steps.

    Args:
        steps: into so many the tokens are cut, at most.
        comm: the group, whether ranks hold shards of the tokens, and memory for all of these; of a column layer its
            collectives backward, too.
        fuse_wgrad: add the weight gradient to ``weight.main_grad`` in place.
        transport: what bytes move with.
        least_tokens: of all ranks. Fewer do not go by steps.
    """

    steps: int
    comm: ColumnComm
    fuse_wgrad: bool = False
    transport: Transport = "auto"
    least_tokens: int = 0

    def cut(self, shard: Tensor, own: Own) -> list[Step]:
        """The steps of a pass over ``shard [rows, ..., features]``."""
        return cut(shard.shape[0], _tokens_of_row(shard), self.comm.shards, self.steps, own)

    def start(self, sources: Sequence[Tensor], out: Tensor | None) -> StepComm:
        """Begin a pass."""
        return start_steps(self.comm, sources, out, self.transport)

    def places(self, step: Step, shard: Tensor) -> list[slice]:
        """Where a step's tokens are among all, which are in the order of the ranks."""
        found = places(step, shard.shape[0], self.comm.group.rank(), self.comm.shards)
        size = _tokens_of_row(shard)
        return [slice(rows.start * size, rows.stop * size) for rows in found]

    def memory(self, shard: Tensor) -> Tensor:
        """``[n, features]`` for the tokens of all ranks, of memory that other layers gather into as well."""
        shape = self.comm.shards * shard.shape[0] * _tokens_of_row(shard), shard.shape[-1]
        memory = self.comm.gather_buffer(shape, shard.dtype)
        return memory if on_gpu(memory) else memory.zero_()  # as ``scratch``: rows are read beyond a step's end

    def gather(self, shard: Tensor, whole: Tensor, use: Callable[[slice], object]) -> None:
        """Gather the tokens of all ranks, and give each step's place among them to ``use`` once they are there.

        Args:
            shard: ``[rows, ..., features]``.
            whole: ``[n, features]`` for the tokens of all ranks, which is filled.
        """
        with self.start([shard], None) as comm:
            steps = self.cut(shard, own="first")
            arriving = [comm.fetch_to_place(0, step, whole) for step in steps]
            for step, arrived in zip(steps, arriving, strict=True):
                arrived()
                for tokens in self.places(step, shard):
                    use(tokens)

    def of_all(self, shard: Tensor, features: int) -> Tensor:
        """New memory for ``[rows of all shards, ..., features]``."""
        return shard.new_empty(self.comm.shards * shard.shape[0], *shard.shape[1:-1], features)


def _tokens_of_row(tensor: Tensor) -> int:
    return prod(tensor.shape[1:-1])


def stepped_column(hidden: Tensor, weight: Tensor, bias: Tensor | None, loop: LinearSteps) -> Tensor:
    """``hidden @ weight.T + bias`` for the tokens of all ranks, under sequence parallelism.

    Args:
        hidden: ``[s/tp, ..., h]``, at least one token.
        weight: ``[out_features, h]``.
        bias: ``[out_features]`` or ``None``.
        loop: the steps and the options.

    Returns:
        ``[s, ..., out_features]``.
    """
    output: Tensor = _SteppedColumn.apply(weight, bias, loop, hidden)
    return output


def stepped_row(input_: Tensor, weight: Tensor, loop: LinearSteps) -> Tensor:
    """``input_ @ weight.T``, summed over tensor-parallel ranks.

    Args:
        input_: ``[s, ..., f]``, at least one token; under sequence parallelism ``s`` is a multiple of ``tp``.
        weight: ``[h, f]``.
        loop: the steps and the options.

    Returns:
        ``[s, ..., h]``; under sequence parallelism this rank's ``[s/tp, ..., h]``.
    """
    output: Tensor = _SteppedRow.apply(weight, loop, input_)
    return output


class _SteppedColumn(torch.autograd.Function):
    """The steps forward, one tile backward, as without steps. A step has ``m`` of the ``n`` tokens of all ranks.

    ==========  ====================================  ========================================================
    beside it   x_j+1 ``[m, h]`` and all later ones arrive
    forward     x_j, W ``[out, h]``                   y_j ``[m, out]`` = x_j W^T (+ b), in its place in ``[n, out]``
    ----------  ------------------------------------  --------------------------------------------------------
    dgrad       dy ``[n, out]``, W; x arrives         dx ``[n, h]`` = dy W
    wgrad       dy, x ``[n, h]``; dx goes             dW ``[out, h]`` = dy^T x
    ==========  ====================================  ========================================================
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, loop: LinearSteps, hidden: Tensor) -> Tensor:
        grid = TileGrid(weight.shape[1], weight.shape[0])
        save_for_backward(ctx, weight, TileLoop(grid, fuse_wgrad=loop.fuse_wgrad, comm=loop.comm), [hidden])
        output = loop.of_all(hidden, weight.shape[0])
        steps = loop.cut(hidden, own="first")
        with loop.start([hidden], None) as comm:
            x = comm.whole(0, lambda: loop.memory(hidden))
            # None of the own tokens, which are read where they are.
            arriving = [comm.fetch_to_place(0, step, x) if step.own_rows is None else None for step in steps]
            for step, arrived in zip(steps, arriving, strict=True):
                if arrived is not None:
                    arrived()
                for tokens in loop.places(step, hidden):
                    operand = x[tokens] if step.own_rows is None else flat(comm.sources[0][step.own_rows])
                    gemm_into(flat(output)[tokens], operand, weight.t(), accumulate=False)
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return TiledLinearFunction.backward(ctx, grad_output)


class _SteppedRow(torch.autograd.Function):
    """The steps both ways. A step has ``m`` of the ``n`` tokens of all ranks.

    ==========  ====================================  ========================================================
    beside it                                         y_j-1 goes to its ranks, and is added up there
    forward     x_j ``[m, f]``, W ``[h, f]``          y_j ``[m, h]`` = x_j W^T, of this rank's features
    ----------  ------------------------------------  --------------------------------------------------------
    beside it   dy_j+1 ``[m, h]`` and all later ones arrive
    dgrad       dy_j, W                               dx_j ``[m, f]`` = dy_j W, in its place in ``[n, f]``
    wgrad       dy ``[n, h]``, x ``[n, f]``           dW ``[h, f]`` = dy^T x
    ==========  ====================================  ========================================================

    Without sequence parallelism nothing has to arrive backward: that is one step.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, loop: LinearSteps, input_: Tensor) -> Tensor:
        needs_wgrad, _, needs_dgrad = ctx.needs_input_grad
        ctx.loop = loop
        ctx.param = weight if needs_wgrad else None  # it carries main_grad, which saved tensors may lose
        ctx.save_for_backward(weight if needs_dgrad else None, input_ if needs_wgrad else None)
        x = flat(input_)
        output = input_.new_empty(input_.shape[0] // loop.comm.shards, *input_.shape[1:-1], weight.shape[0])
        with loop.start([], output) as comm:
            for step in loop.cut(output, own="last"):
                partial = comm.partial(step)
                found = loop.places(step, output)
                parts = partial.split([tokens.stop - tokens.start for tokens in found])
                for tokens, part in zip(found, parts, strict=True):
                    gemm_into(part, x[tokens], weight.t(), accumulate=False)
                comm.push(partial, step)
                del partial, parts, part
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        loop: LinearSteps = ctx.loop
        weight, input_ = ctx.saved_tensors
        needs_wgrad, _, needs_dgrad = ctx.needs_input_grad
        dgrad = loop.of_all(grad_output, weight.shape[1]) if needs_dgrad else None
        dy = flat(grad_output) if loop.comm.shards == 1 else loop.memory(grad_output)

        def add_dgrad(tokens: slice) -> None:
            if dgrad is not None:
                gemm_into(flat(dgrad)[tokens], dy[tokens], weight, accumulate=False)

        if loop.comm.shards == 1:
            add_dgrad(WHOLE)
        else:
            loop.gather(grad_output, dy, add_dgrad)
        wgrad = None
        if needs_wgrad:
            gradient = WeightGrad(ctx.param, loop.fuse_wgrad)
            gradient.add(WHOLE, WHOLE, dy, flat(input_))
            wgrad = gradient.result()
        return wgrad, None, dgrad

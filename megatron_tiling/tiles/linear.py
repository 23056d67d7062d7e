"""The tile loop of a linear layer whose weight is resident, as one autograd function over the dense weight.

Every GEMM writes into its slice of one preallocated tensor or adds to it in place: no clone, no concatenation, no
gradient per tile. Depends on torch alone; the tensor-parallel collectives of a column layer are described by
``ColumnComm`` and run once a layer, not once a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.gemm import gemm_into
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.wgrad import WeightGrad


@dataclass  # not frozen: torch.compile of torch 2.10 cannot give a frozen one to an autograd function
class TileLoop:
    """How ``tiled_linear`` runs.

    Args:
        grid: the tiles of the weight.
        combine_out_splits: one output tensor, or one a tile.
        fuse_wgrad: add the weight gradient to ``weight.main_grad`` in place, and give autograd none.
        fp32_accumulate: sum over tiles in float32, then round once to the activations' dtype.
        comm: collectives of a column layer with tensor parallelism.
        saves_weight: as autograd does; else the parameter is read again in the backward pass, where an engine that
            swaps or frees it in between has put it back.
    """

    grid: TileGrid
    combine_out_splits: bool = True
    fuse_wgrad: bool = False
    fp32_accumulate: bool = False
    comm: ColumnComm | None = None
    saves_weight: bool = True


def tiled_linear(
    input_: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None, loop: TileLoop
) -> Tensor | list[Tensor]:
    """``input_ @ weight.T + bias``, tile after tile.

    Args:
        input_: ``[..., in_features]``, or the ``in_splits`` parts of it along the last dimension.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or ``None``.
        loop: the grid and the options.

    Returns:
        ``[..., out_features]``, or with ``combine_out_splits=False`` a list of one tensor an out-tile
        (``[gate | up]`` of the same features for ``paired`` tiles).

    Raises:
        ValueError: the parts given are not the grid's in-tiles.
    """
    if isinstance(input_, Tensor):
        parts = [input_]
    else:
        parts = list(input_)
        loop.grid.check_parts([part.shape[-1] for part in parts])
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parts = [part.to(dtype) for part in parts]
        bias = None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if loop.saves_weight else weight
    outputs = TiledLinearFunction.apply(weight, bias, loop, *parts)
    return outputs[0] if loop.combine_out_splits else list(outputs)


class TiledLinearFunction(torch.autograd.Function):
    """The tile loop. Tokens ``n`` = all dimensions but the last; ``in_i``, ``out_o``: sizes of a tile.

    =========  ===============================================  ====================================================
    forward    x_i ``[n, in_i]``, W_oi ``[out_o, in_i]``        y_o ``[n, out_o]`` = sum over i of x_i W_oi^T (+ b_o)
    dgrad      dy_o ``[n, out_o]``, W_oi                        dx_i ``[n, in_i]`` = sum over o of dy_o W_oi
    wgrad      dy_o, x_i                                        dW_oi ``[out_o, in_i]`` = dy_o^T x_i
    bias       dy_o                                             db_o ``[out_o]`` = sum over n of dy_o
    =========  ===============================================  ====================================================

    Under sequence parallelism ``n`` counts the gathered tokens, and the input and its gradient are shards of them.
    dgrad comes first, so that its reduction runs under the wgrad GEMMs.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, loop: TileLoop, *parts: Tensor) -> tuple[Tensor, ...]:
        grid, comm = loop.grid, loop.comm
        save_for_backward(ctx, weight, loop, parts)
        if not loop.saves_weight:
            weight = weight.to(parts[0].dtype)  # autocast's: a copy, which is not kept
        if comm is not None and comm.sequence_parallel:
            parts = (comm.gather(parts[0])[0],)
        inputs = in_tiles(grid, parts)
        sizes = [grid.out_features] if loop.combine_out_splits else map(grid.out_size, range(grid.out_splits))
        outputs = tuple(parts[0].new_empty(*parts[0].shape[:-1], size) for size in sizes)
        for rows, out in row_slices(grid, outputs):
            products = [(x, weight[rows, grid.columns(i)].t()) for i, x in enumerate(inputs)]
            sum_products(out, products, loop.fp32_accumulate)
            if bias is not None:
                out += bias[rows]
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        loop: TileLoop = ctx.loop
        if not loop.saves_weight:
            weight = ctx.param.to(grad_outputs[0].dtype)
        grid, comm = loop.grid, loop.comm
        needs_wgrad, needs_bias_grad, _, *needs_dgrad = ctx.needs_input_grad
        grads = list(row_slices(grid, grad_outputs))

        gathering = None
        if needs_wgrad and comm is not None and comm.sequence_parallel:
            full, gathering = comm.gather(parts[0], async_op=True)
            parts = [full]

        dgrads: list[Tensor | None] = [None] * len(needs_dgrad)
        reducing = None
        if any(needs_dgrad):
            sizes = [grid.in_features] if len(dgrads) == 1 else map(grid.in_size, range(grid.in_splits))
            full_dgrads = [grad_outputs[0].new_empty(*grad_outputs[0].shape[:-1], size) for size in sizes]
            for i, dgrad in enumerate(in_tiles(grid, full_dgrads)):
                products = [(dy, weight[rows, grid.columns(i)]) for rows, dy in grads]
                sum_products(dgrad, products, loop.fp32_accumulate)
            if comm is not None:
                full_dgrads[0], reducing = comm.reduce(full_dgrads[0])
            dgrads = list(full_dgrads)

        wgrad = bias_grad = None
        if needs_wgrad:
            if gathering is not None:
                gathering.wait()
            gradient = WeightGrad(ctx.param, loop.fuse_wgrad)
            for i, x in enumerate(in_tiles(grid, parts)):
                for rows, dy in grads:
                    gradient.add(rows, grid.columns(i), dy, x)
            wgrad = gradient.result()
        if needs_bias_grad:
            bias_grad = grad_outputs[0].new_empty(grid.out_features)
            for rows, dy in grads:
                torch.sum(dy, dim=0, out=bias_grad[rows])
        if reducing is not None:
            reducing.wait()
        return wgrad, bias_grad, None, *dgrads


def save_for_backward(ctx: Any, weight: Tensor, loop: TileLoop, parts: Sequence[Tensor]) -> None:
    """What the backward pass of ``TiledLinearFunction`` needs."""
    needs_wgrad, _, _, *needs_dgrad = ctx.needs_input_grad
    ctx.loop = loop
    saves_weight = loop.saves_weight and any(needs_dgrad)
    # It carries main_grad, which saved tensors may lose.
    ctx.param = weight if needs_wgrad or not loop.saves_weight else None
    # A frozen weight needs no input, an input without gradient needs no weight.
    ctx.save_for_backward(weight if saves_weight else None, *(parts if needs_wgrad else ()))


def in_tiles(grid: TileGrid, parts: Sequence[Tensor]) -> list[Tensor]:
    """``[tokens, in_i]`` of each in-tile: views of one whole tensor, or the parts that were given."""
    if len(parts) == grid.in_splits:
        return [flat(part) for part in parts]
    whole = flat(parts[0])
    return [whole[:, grid.columns(i)] for i in range(grid.in_splits)]


def row_slices(grid: TileGrid, outputs: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Weight rows and the ``[tokens, rows]`` columns of the output that they make, over all out-tiles.

    ``outputs`` is one whole tensor or one a tile; a paired tile gives two slices, its gate's and its up's.
    """
    flattened = [flat(output) for output in outputs]
    for o in range(grid.out_splits):
        for half, rows in enumerate(grid.row_ranges(o)):
            if len(flattened) == grid.out_splits:
                width = rows.stop - rows.start
                yield rows, flattened[o][:, half * width : (half + 1) * width]
            else:
                yield rows, flattened[0][:, rows]


def sum_products(out: Tensor, products: Sequence[tuple[Tensor, Tensor]], fp32_accumulate: bool) -> None:
    """``out = sum of a @ b`` for 2-D views; in float32 on the way if asked and there is more than one term."""
    widen = fp32_accumulate and len(products) > 1 and out.dtype in (torch.float16, torch.bfloat16)
    total = torch.empty_like(out, dtype=torch.float32) if widen else out
    for index, (a, b) in enumerate(products):
        gemm_into(total, a, b, accumulate=index > 0)
    if widen:
        out.copy_(total)

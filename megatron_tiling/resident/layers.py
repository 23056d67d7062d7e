"""Megatron's column- and row-parallel linear layers, computed tile by tile (resident weights).

A tiled layer *is* the stock layer: same parameter, initialisation, options and checkpoint. Only ``_forward_impl``,
the matrix product inside stock's ``forward``, is replaced by ``tiles.linear.tiled_linear``. Communication around the
product stays stock's; what stock does within it (the sequence-parallel gather, the reduction of the input gradient
under the weight gradient) is done here, once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partialmethod
from typing import Any, Self

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_tiling.arguments import REFUSED, refuse
from megatron_tiling.resident.comm import column_comm
from megatron_tiling.resident.stepped import column_in_steps, row_in_steps
from megatron_tiling.resident.stock_code import replaced_forward, replaced_in_products
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT, TileGrid
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
from megatron_tiling.tiles.step_comm import Transport
from megatron_tiling.tiles.tiled_linear import TiledLinearReturnBias


class TiledParallelLinear(torch.nn.Module):
    """What the two tiled layers share: the grid, its set-up, and the tile loop in place of the matrix product.

    Attributes:
        overlap_steps: in at most so many steps of tokens communication runs behind products, in place of tiles, where
            a call can do so. Of fc1 and fc2 where a ``TiledMLP`` calls them; its loop has its own.
        least_overlap_tokens: of all ranks; a call of fewer goes by tiles.
        transport: what bytes move with then.
        fewer_if_small: of fc1 and fc2: nobody has given their number, a ``TiledMLP`` has fewer where they do little.
    """

    #: What Megatron-Bridge reads of a class that it does not know, to split and join a weight.
    tensor_model_parallel = True
    partition_dim: int

    config: Any
    weight: Any
    bias: Any
    gradient_accumulation_fusion: bool
    grid: TileGrid
    combine_out_splits: bool
    fp32_accumulate: bool
    input_is_already_split: bool
    overlap_steps: int | None = None
    least_overlap_tokens: int = 0
    transport: Transport = "auto"
    fewer_if_small: bool = False

    @classmethod
    @cache
    def with_splits(cls, in_splits: int, out_splits: int, fewer_if_small: bool = False) -> type[Self]:
        """A subclass for model specs, which take a class and no keywords, whose layers have this grid."""
        init = partialmethod(cls.__init__, in_splits=in_splits, out_splits=out_splits)
        attributes = {"__init__": init, "fewer_if_small": fewer_if_small}
        return type(f"{cls.__name__}_{in_splits}x{out_splits}", (cls,), attributes)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        in_splits: int = 1,
        out_splits: int = 1,
        combine_out_splits: bool = True,
        fp32_accumulate: bool = False,
        **options: Any,
    ) -> None:
        config = options["config"]
        wanted = config.gradient_accumulation_fusion
        config.gradient_accumulation_fusion = False  # it is ours: stock's constructor refuses it where apex is missing
        try:
            self._init_stock(input_size, output_size, options)
            self.gradient_accumulation_fusion = wanted
            paired = options.get("tp_comm_buffer_name") == "fc1" and getattr(config, "gated_linear_unit", False)
            tiling: dict[str, Any] = {"combine_out_splits": combine_out_splits, "fp32_accumulate": fp32_accumulate}
            self.set_tiles(in_splits, out_splits, paired=paired, **tiling)
        finally:
            config.gradient_accumulation_fusion = wanted

    def _init_stock(self, input_size: int, output_size: int, options: dict[str, Any]) -> None:
        """Build the stock layer, with its weight."""
        super().__init__(input_size, output_size, **options)

    def adopt(self) -> None:
        """Make a built stock layer, whose class was set, ready for ``set_grid``."""

    def set_tiles(self, in_splits: int, out_splits: int, *, paired: bool = False, **options: Any) -> None:
        """Choose the grid by its numbers, which must fit the rank's shard; ``options`` as for ``set_grid``."""
        rows, columns = shard_shape(self)
        self.set_grid(TileGrid(columns, rows, in_splits, out_splits, paired, FEATURE_ALIGNMENT), **options)

    def set_grid(self, grid: TileGrid, *, combine_out_splits: bool = True, fp32_accumulate: bool = False) -> None:
        """Choose the grid over the rank's shard. The weight is neither drawn nor copied.

        Raises:
            ValueError: the layer has an option that cannot be tiled.
        """
        check_layer(self)
        # Joined, the rows of paired tiles would be out of order.
        self.grid = replace(grid, paired=False) if combine_out_splits else grid
        self.combine_out_splits = combine_out_splits
        self.fp32_accumulate = fp32_accumulate

    def normalized(self, input_: Tensor) -> Tensor:
        """The input of the tiles, ``[s, b, h]``: of the layer itself, unless it has a norm of its own."""
        return input_

    def reason_to_be_called(self) -> str:
        """Why a ``TiledMLP`` must call this layer's ``forward`` now, or nothing."""
        if self.weight is not None and not fits(self.grid, self.weight):  # else it is given the embedding's
            return "has a weight of another shape than its tiles"
        return replaced_forward(type(self))

    @property
    def tiles(self) -> TiledLinearReturnBias:
        """Modules over views of this layer's weight, made anew at each call, which run without communication."""
        views = (_TileView(self, self.grid, o, i) for o, i in self.grid.indices())
        return self._container(TiledLinearReturnBias, views, bias=self.bias is not None)

    def _container[T: TiledLinearReturnBias](
        self, container: type[T], tiles: Iterator[torch.nn.Module], bias: bool
    ) -> T:
        """The grid as a module over tiles, which are taken one by one."""
        grid = self.grid
        module = container(
            grid.in_features,
            grid.out_features,
            bias=bias,
            in_splits=grid.in_splits,
            out_splits=grid.out_splits,
            input_is_already_split=self.input_is_already_split,
            combine_out_splits=self.combine_out_splits,
            linear_cls=lambda *args, **kwargs: next(tiles),
        )
        module.in_parts, module.out_parts = grid.in_parts, grid.out_parts
        return module

    def _forward_impl(self, input: Tensor | Sequence[Tensor], weight: Tensor, **options: Any) -> Tensor | list[Tensor]:
        """What stock's ``forward`` calls: the tile loop, or what somebody has put in the place of stock's product.

        Raises:
            RuntimeError: there is such a product, and parts or partitioned tiles to give it.
        """
        replaced = replaced_in_products()
        if not replaced:
            return self._tiled_product(input, weight, **options)
        if not isinstance(input, Tensor) or not self.combine_out_splits or self.weight is None:
            raise RuntimeError(f"{replaced}: it takes whole weights and inputs; leave this layer dense")
        product: Tensor = super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
        return product

    def _tiled_product(
        self,
        input_: Tensor | Sequence[Tensor],
        weight: Tensor,
        *,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        grad_output_buffer: list[Tensor] | None,
        wgrad_deferral_limit: int | None = None,
        gtp_remat_size: int = 1,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor | list[Tensor]:
        """The tile loop, by the keywords of stock's product.

        Raises:
            ValueError: the output is wanted in another dtype than the parameters have.
        """
        if reason := reason_in_output_dtype(output_dtype, self.config.params_dtype):
            raise ValueError(reason)
        return self._product(input_, weight, bias, column_comm(tp_group, sequence_parallel, allreduce_dgrad))

    def _product(
        self, input_: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None, comm: ColumnComm | None
    ) -> Tensor | list[Tensor]:
        if self.overlap_steps is not None and comm is not None:
            output = column_in_steps(self, input_, weight, bias, comm)
            if output is not None:
                return output
        fuse_wgrad = self.gradient_accumulation_fusion
        grid = self.grid
        if not fits(grid, weight):  # somebody has given the layer another one
            grid = replace(grid, out_features=weight.shape[0], in_features=weight.shape[1])
        loop = TileLoop(grid, self.combine_out_splits, fuse_wgrad, self.fp32_accumulate, comm)
        return tiled_linear(input_, weight, bias, loop)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tiles={self.grid}"


class TiledColumnParallelLinear(TiledParallelLinear, ColumnParallelLinear):
    """``ColumnParallelLinear`` in tiles.

    Args:
        in_splits, out_splits: the grid over this rank's shard ``[output_size / tp, input_size]``.
        combine_out_splits: ``False`` returns ``([one [s, b, out_o] tensor an out-tile], bias)``, in the order in
            which a row layer takes them; for fc1 of a gated MLP each is ``[gate_o | up_o]``.
        fp32_accumulate: sum over in-tiles (and over out-tiles in the input gradient) in float32.
        args, kwargs: as for ``megatron.core.tensor_parallel.ColumnParallelLinear``.

    Raises:
        ValueError: the grid does not fit the shard; ``combine_out_splits=False`` with ``gather_output=True``;
            ``defer_embedding_wgrad_compute`` or sharded weights (GTP).
    """

    partition_dim = 0
    input_is_already_split = False
    gather_output: bool

    def set_grid(self, grid: TileGrid, **options: Any) -> None:
        super().set_grid(grid, **options)
        self._check_gather(self.gather_output)

    def _check_gather(self, gather_output: bool) -> None:
        if gather_output and not self.combine_out_splits:
            raise ValueError("combine_out_splits=False returns a list of tiles, which gather_output=True cannot gather")

    def forward(
        self, input_: Any, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> stock's output, or a list of tiles, and bias.

        Raises:
            ValueError: a list is given, or the output is to be gathered with ``combine_out_splits=False``.
        """
        self._check_gather(bool(runtime_gather_output))
        result: tuple[Any, Tensor | None] = super().forward(
            one_tensor(input_), weight=weight, runtime_gather_output=runtime_gather_output
        )
        return result


class TiledRowParallelLinear(TiledParallelLinear, RowParallelLinear):
    """``RowParallelLinear`` in tiles.

    With ``input_is_parallel=True``, ``forward`` also takes the ``in_splits`` tiles of its input as a list: what a
    column layer with ``combine_out_splits=False`` returned, after the activation.

    Args:
        in_splits, out_splits: the grid over this rank's shard ``[output_size, input_size / tp]``.
        fp32_accumulate: sum over in-tiles (and over out-tiles in the input gradient) in float32.
        args, kwargs: as for ``megatron.core.tensor_parallel.RowParallelLinear``.

    Raises:
        ValueError: the grid does not fit the shard; ``combine_out_splits=False``, which a row layer's reduction over
            tensor-parallel ranks leaves no room for; sharded weights (GTP).
    """

    partition_dim = 1
    input_is_parallel: bool
    skip_bias_add: bool

    @property
    def input_is_already_split(self) -> bool:  # type: ignore[override]
        return self.input_is_parallel

    def set_grid(self, grid: TileGrid, *, combine_out_splits: bool = True, **options: Any) -> None:
        if not combine_out_splits:
            raise ValueError("a row layer reduces its output over tensor-parallel ranks: it must combine_out_splits")
        super().set_grid(grid, **options)

    def forward(self, input_: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]``, ``[s, b, h/tp]`` if the input is parallel, or its list of in-tiles -> stock's output and bias.

        Raises:
            ValueError: a list is given where the input is not parallel, of another length than ``in_splits``, with
                tiles of other widths, or with activation offloading to the CPU.
        """
        check_parts(self, input_)
        output = None if self.overlap_steps is None else row_in_steps(self, input_)
        if output is not None:
            return with_bias(output, self.bias, self.skip_bias_add)
        result: tuple[Tensor, Tensor | None] = super().forward(input_)
        return result


class _TileView(torch.nn.Module):
    """Tile (o, i) of a layer's weight, and of its bias at the last in-tile, read from the layer at each call."""

    def __init__(self, layer: TiledParallelLinear, grid: TileGrid, out_tile: int, in_tile: int) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: not a submodule
        self._ranges, self._columns = grid.row_ranges(out_tile), grid.columns(in_tile)
        self._has_bias = in_tile == grid.in_splits - 1

    def _rows(self, tensor: Tensor) -> Tensor:
        slices = [tensor[rows] for rows in self._ranges]
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    @property
    def weight(self) -> Tensor:
        return self._rows(self._layer[0].weight[:, self._columns])

    @property
    def bias(self) -> Tensor | None:
        bias = self._layer[0].bias
        return self._rows(bias) if self._has_bias and bias is not None else None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.nn.functional.linear(input_, self.weight), self.bias


def with_bias(output: Tensor, bias: Tensor | None, skips: bool) -> tuple[Tensor, Tensor | None]:
    """What a row layer returns: the bias is added, or left to the caller."""
    if skips:
        return output, bias
    return output if bias is None else output + bias, None


def one_tensor(input_: Any) -> Tensor:
    """The input of a column layer.

    Raises:
        ValueError: a list is given.
    """
    if isinstance(input_, (list, tuple)):
        raise ValueError(
            f"a column layer takes one tensor, every rank the same features; it was given {len(input_)} parts"
        )
    tensor: Tensor = input_
    return tensor


def check_parts(layer: Any, input_: Tensor | Sequence[Tensor]) -> None:
    """Check the input of a row layer, where that is the list of its in-tiles.

    Raises:
        ValueError: the input is not parallel, the parts are not the grid's, or activations go to the CPU.
    """
    if isinstance(input_, Tensor):
        return
    if not layer.input_is_parallel:
        raise ValueError(
            f"a list of {len(input_)} parts is this rank's shard already split: it needs input_is_parallel=True"
        )
    layer.grid.check_parts([part.shape[-1] for part in input_])
    if getattr(layer.config, "cpu_offloading", False):
        raise ValueError("an already split input cannot be offloaded to the CPU; leave out --cpu-offloading")


#: What a stock layer becomes.
RESIDENT_CLASSES: dict[type[torch.nn.Module], type[TiledParallelLinear]] = {
    ColumnParallelLinear: TiledColumnParallelLinear,
    RowParallelLinear: TiledRowParallelLinear,
}


def fits(grid: TileGrid, weight: Tensor) -> bool:
    """Whether a weight is of the shape that ``grid`` divides."""
    return (grid.out_features, grid.in_features) == tuple(weight.shape)


def reason_in_output_dtype(wanted: torch.dtype | None, dtype: torch.dtype) -> str:
    """Why tiles cannot give an output of this dtype, which a layer of Megatron's main branch (0.20) may ask for."""
    if wanted in (None, dtype):
        return ""
    return f"--output-logit-dtype {wanted}: tiles write their output in the dtype of their input"


def check_layer(layer: Any) -> None:
    """Refuse a layer, stock or tiled, with an option that tiles do not go with.

    Raises:
        ValueError: naming the flag.
    """
    refuse(layer.config, REFUSED["tiled layers"])
    sharded = (getattr(owner, "gtp_remat_size", None) or 1 for owner in (layer, getattr(layer, "weight", None)))
    if max(sharded) > 1:  # by its process groups, whatever the config says
        raise ValueError(
            "a tiled layer cannot have its weight sharded by --tensor-parallel-num-weight-shards "
            "(--expert-tensor-parallel-num-weight-shards); leave the flag out, or the layer dense"
        )
    if reason := reason_in_output_dtype(getattr(layer, "output_dtype", None), layer.config.params_dtype):
        raise ValueError(f"{reason}; leave the flag out, or the layer dense")


def shard_shape(layer: Any) -> tuple[int, int]:
    """``[out, in]`` of this rank's weight, of a column or row layer, or as another layer's parameters have it."""
    if isinstance(layer, ColumnParallelLinear):
        return layer.output_size_per_partition, layer.input_size
    if isinstance(layer, RowParallelLinear):
        return layer.output_size, layer.input_size_per_partition
    weight = next((weight for weight in layer.parameters(recurse=False) if weight.dim() > 1), None)
    return (weight.shape[0], weight.shape[-1]) if weight is not None else (0, 0)

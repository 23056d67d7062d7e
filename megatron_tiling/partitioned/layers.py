"""Megatron's column- and row-parallel linear layers whose tiles are parameters, for ZeRO-3 and FSDP.

A partitioned layer is the tiled layer without its weight: ``layer.tiles`` is a ``TiledLinearReturnBias`` whose
modules own the tiles, so that an engine's hooks gather each of them right around its use. The bias stays the
layer's. Communication around the product stays stock's; what stock does within it is done once around the tiles,
with Megatron's own mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.nn import Parameter

from megatron_tiling.log import logger
from megatron_tiling.partitioned.checkpoint import put_dense_weight, sharded_tiles, take_dense_weight
from megatron_tiling.partitioned.modules import PairedTiles, PartitionedTiles, WeightTile
from megatron_tiling.resident.layers import (
    TiledColumnParallelLinear,
    TiledParallelLinear,
    TiledRowParallelLinear,
    shard_shape,
)
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.ownership import gathered, tags
from megatron_tiling.tiles.remade import made_again


class PartitionedParallelLinear(TiledParallelLinear):
    """What the two partitioned layers share: making the tiles, and calling them."""

    stock_class: Any
    #: Whether another module, that of an MLP's tile, owns and loads the tiles' parameters.
    tiles_are_elsewhere = False
    #: Whether the model looks for this layer's weight in the sharded state dict.
    is_output_layer: bool
    #: What makes tile ``(o, i)``, if not the dense weight.
    draw_tile: Callable[[int, int], Parameter] | None = None
    #: While stock's ``sharded_state_dict`` describes the dense weight: its shape and dtype, without memory.
    dense_stand_in: Tensor | None = None

    def _init_stock(self, input_size: int, output_size: int, options: dict[str, Any]) -> None:
        """Build the stock layer, its weight drawn as ever; where that finds no room, its tiles are to be drawn."""
        try:
            self.stock_class.__init__(self, input_size, output_size, **options)
            return
        except torch.OutOfMemoryError as error:
            room = f"a weight of [out, in] = {[output_size, input_size]} finds no room ({error})"
            logger.warning(f"{room}: its tiles are drawn one by one, and differ from what a dense run draws")
        # One column a rank stands for the weight's attributes.
        group = get_tensor_model_parallel_group_if_none(options.get("tp_group"), options.get("is_expert", False))
        in_ranks, out_ranks = (1, group.size()) if self.stock_class is ColumnParallelLinear else (group.size(), 1)
        self.stock_class.__init__(self, in_ranks, output_size, **(options | {"init_method": lambda weight: None}))
        self.input_size, self.input_size_per_partition = input_size, input_size // in_ranks

        def draw(o: int, i: int) -> Parameter:
            """As a stock layer of the tile's size draws its weight: same method, generator and device."""
            sizes = self.grid.in_size(i) * in_ranks, self.grid.out_size(o) * out_ranks
            weight: Parameter = self.stock_class(*sizes, **(options | {"bias": False, "stride": 1})).weight
            return weight

        self.draw_tile = draw

    def set_grid(self, grid: TileGrid, *, fp32_accumulate: bool = False, **options: Any) -> None:
        """Choose the grid, and give the dense weight's place to tiles: copies of its parts, or drawn one by one.

        Raises:
            ValueError: as for the resident layer; there is no weight; ``fp32_accumulate``.
        """
        if fp32_accumulate:
            raise ValueError(
                "--tiled-linear-fp32-accumulate: partitioned tiles are summed by autograd, in the activations' dtype; "
                "leave it out, or give --tiled-linear-storage resident"
            )
        weight: Parameter | None = self.weight
        if weight is None:
            raise ValueError(
                "a partitioned layer owns its tiles: it cannot be built without a weight (skip_weight_param_allocation "
                "of a tied output layer); leave it dense"
            )
        super().set_grid(grid, **options)
        self.grid = grid  # paired ones, too, come out in order
        self.is_output_layer = bool(getattr(weight, "is_embedding_or_output_parameter", False))
        self.gradient_accumulation_fusion = False

        def cut(o: int, i: int) -> Parameter:
            tile = torch.cat([weight.detach()[rows, grid.columns(i)] for rows in grid.row_ranges(o)])
            return Parameter(tile, requires_grad=weight.requires_grad)

        def tile(o: int, i: int) -> WeightTile:
            parameter = (self.draw_tile or cut)(o, i)
            vars(parameter).update(tags(weight))
            return WeightTile(parameter)

        # Made one at a time: under zero.Init each is partitioned before the next one is there.
        tiles = (tile(o, i) for o, i in grid.indices())
        container = PairedTiles if grid.paired else PartitionedTiles
        with gathered(weight):
            self.tiles = self._container(container, tiles, bias=False)  # type: ignore[misc]
        self.weight = self.draw_tile = None
        self._register_state_dict_hook(put_dense_weight)
        self.register_load_state_dict_pre_hook(take_dense_weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Stock's entries, with one a tile in place of the dense weight's."""
        dtype = self.tiles.linears[0][0].weight.dtype  # type: ignore[index]
        self.dense_stand_in = torch.empty(shard_shape(self), dtype=dtype, device="meta")
        try:
            entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        finally:
            self.dense_stand_in = None
        return sharded_tiles(self, entries, prefix, metadata)

    @property
    def tiles(self) -> PartitionedTiles:
        """The modules that own the tiles, ``tiles.linears[o][i].weight``."""
        return self._modules["tiles"]  # type: ignore[return-value]

    def reason_to_be_called(self) -> str:
        return "" if self.weight is None else "was given a weight"

    def _product(  # type: ignore[override]
        self, input_: Tensor | Sequence[Tensor], weight: None, bias: Tensor | None, comm: ColumnComm | None
    ) -> Tensor | list[Tensor]:
        if self.weight is not None:
            raise RuntimeError(
                "a partitioned layer, whose tiles are its parameters, was given a weight, which nothing reads; give it "
                "before the model is tiled, or load it with load_state_dict"
            )
        saving: AbstractContextManager[None] = nullcontext()
        if isinstance(input_, Tensor):
            input_, saving = column_input(input_, comm)
        if self.input_is_already_split and isinstance(input_, Tensor):
            input_ = [input_[..., self.grid.columns(i)] for i in range(self.grid.in_splits)]
        with saving:
            result = self.tiles(input_)
        if self.combine_out_splits:
            output: Tensor = result[0]
            return output if bias is None else output + bias.to(output.dtype)
        outputs = [output for output, _ in result]
        if bias is None:
            return outputs
        biases = [torch.cat([bias[rows] for rows in self.grid.row_ranges(o)]) for o in range(self.grid.out_splits)]
        return [output + bias.to(output.dtype) for output, bias in zip(outputs, biases, strict=True)]


class PartitionedColumnParallelLinear(PartitionedParallelLinear, TiledColumnParallelLinear):
    """``TiledColumnParallelLinear`` whose tiles are parameters ``tiles.linears[o][0].weight``; its ``weight`` is None.

    Drawn as the dense weight is, which exists while this one layer is built; where it finds no room, tile by tile.
    Weight gradients are plain ones, whatever ``config.gradient_accumulation_fusion`` says.

    Args:
        args, kwargs: as for ``TiledColumnParallelLinear``.

    Raises:
        ValueError: as there; ``fp32_accumulate``; ``skip_weight_param_allocation``.
    """

    stock_class = ColumnParallelLinear
    output_size_per_partition: int

    def forward(
        self, input_: Any, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """As ``TiledColumnParallelLinear.forward``; it takes no weight."""
        if weight is not None:
            raise ValueError("a partitioned layer owns its tiles and takes no weight=; leave this layer dense")
        # Stock's forward asks for a weight and checks its shape: this one has no memory.
        stand_in = torch.empty(self.output_size_per_partition, self.input_size, device="meta")
        return super().forward(input_, weight=stand_in, runtime_gather_output=runtime_gather_output)


class PartitionedRowParallelLinear(PartitionedParallelLinear, TiledRowParallelLinear):
    """``TiledRowParallelLinear`` whose tiles are parameters ``tiles.linears[o][i].weight``; its ``weight`` is None.

    See ``PartitionedColumnParallelLinear``.
    """

    stock_class = RowParallelLinear


PARTITIONED_CLASSES: dict[type[torch.nn.Module], type[PartitionedParallelLinear]] = {
    ColumnParallelLinear: PartitionedColumnParallelLinear,
    RowParallelLinear: PartitionedRowParallelLinear,
}


def make_partitioned(layer: torch.nn.Module, grid: TileGrid) -> None:
    """Turn a built stock layer into a partitioned one, in place: its weight is copied into tiles, and let go.

    A weight that ZeRO-3 owns is gathered meanwhile; call this within ``deepspeed.zero.Init``, and the tiles are
    partitioned as they are made.
    """
    layer.__class__ = PARTITIONED_CLASSES[type(layer)]
    assert isinstance(layer, PartitionedParallelLinear)
    layer.set_grid(grid)


def column_input(input_: Tensor, comm: ColumnComm | None) -> tuple[Tensor, AbstractContextManager[None]]:
    """A column layer's collectives, once around all of its tiles.

    Returns:
        ``[s, b, h]`` of every rank's tokens, whose gradient is reduced, and a context for the tiles to run in.
    """
    if comm is None:
        return input_, nullcontext()
    if not comm.sequence_parallel:
        return copy_to_tensor_model_parallel_region(input_, group=comm.group), nullcontext()
    whole = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=comm.group)
    return whole, made_again(whole, lambda shard: gather_from_sequence_parallel_region(shard, group=comm.group), input_)

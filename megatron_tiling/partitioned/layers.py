"""Megatron's column- and row-parallel linear layers whose tiles are parameters, for ZeRO-3 and FSDP.

A partitioned layer is the tiled layer without its weight: ``layer.tiles`` is a ``TiledLinearReturnBias`` whose
modules own the tiles, so that an engine's hooks gather each of them right around its use. The bias stays the
layer's. Communication around the product stays stock's; what stock does within it is done once around the tiles,
with Megatron's own mappings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.nn import Parameter

from megatron_tiling.partitioned.checkpoint import missing_weights, put_dense_weight, sharded_tiles, take_dense_weight
from megatron_tiling.partitioned.modules import PairedTiles, PartitionedTiles, WeightTile
from megatron_tiling.partitioned.regather import regathered_in_backward
from megatron_tiling.resident.layers import (
    TiledColumnParallelLinear,
    TiledRowParallelLinear,
    _TiledParallelLinear,
    chosen_splits,
    own_wgrad_fusion,
)
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.ownership import gathered

logger = logging.getLogger(__name__)

#: What Megatron's optimizers and reductions read off a weight, besides its tensor-parallel attributes.
WEIGHT_ATTRIBUTES = ("allreduce", "sequence_parallel", "is_embedding_or_output_parameter", "is_embedding_parameter")

DrawTile = Callable[[int, int], Parameter]


class _PartitionedParallelLinear(_TiledParallelLinear):
    """What the two partitioned layers share: making the tiles, and calling them."""

    stock_class: type[torch.nn.Module]
    #: Whether another module, that of an MLP's tile, owns and loads the tiles' parameters.
    tiles_are_elsewhere = False
    #: Whether the model looks for this layer's weight in the sharded state dict.
    is_output_layer: bool
    tp_group: Any
    input_size: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        in_splits: int | None = None,
        out_splits: int | None = None,
        combine_out_splits: bool = True,
        fp32_accumulate: bool = False,
        **options: Any,
    ) -> None:
        draw_tile = None
        with own_wgrad_fusion(self, options["config"]):
            if not self._init_with_dense_weight(input_size, output_size, options):
                self._init_with_one_column(input_size, output_size, options)
                draw_tile = self._tile_drawer(options)
            self.set_tiles(
                *chosen_splits(self.default_splits, in_splits, out_splits),
                combine_out_splits=combine_out_splits,
                paired=options.get("tp_comm_buffer_name") == "fc1" and getattr(self.config, "gated_linear_unit", False),
                fp32_accumulate=fp32_accumulate,
                draw_tile=draw_tile,
            )
        self.gradient_accumulation_fusion = False

    def _init_with_dense_weight(self, input_size: int, output_size: int, options: dict[str, Any]) -> bool:
        """The stock layer, its weight drawn as ever; ``False`` where there is no room for it."""
        try:
            self.stock_class.__init__(self, input_size, output_size, **options)
        except torch.OutOfMemoryError as error:
            logger.warning(
                "a weight of [out, in] = [%d, %d] finds no room: its tiles are drawn one by one, and differ from what "
                "a dense run draws (%s)",
                output_size,
                input_size,
                error,
            )
            return False
        return True

    def _init_with_one_column(self, input_size: int, output_size: int, options: dict[str, Any]) -> None:
        """The stock layer with all but its weight, of which one column a rank stands for the attributes."""
        raise NotImplementedError

    def _tile_drawer(self, options: dict[str, Any]) -> DrawTile:
        """Draws tile (o, i) as a stock layer of its size draws its weight: same method, generator and device."""
        raise NotImplementedError

    def set_tiles(
        self,
        in_splits: int,
        out_splits: int,
        *,
        paired: bool = False,
        draw_tile: DrawTile | None = None,
        **options: Any,
    ) -> None:
        """Choose the grid, and give the dense weight's place to tiles: copies of its parts, or drawn one by one.

        Args:
            in_splits, out_splits: the grid over the rank's shard.
            paired: out-tile ``o`` holds the same features of gate and up; for fc1 of a gated MLP.
            draw_tile: makes tile ``(o, i)``, if not the dense weight.
            options: as for the resident layer.

        Raises:
            ValueError: as for the resident layer; there is no weight; ``fp32_accumulate``.
        """
        if options.get("fp32_accumulate"):
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
        super().set_tiles(in_splits, out_splits, **options)
        self.grid = replace(self.grid, paired=paired)
        self.is_output_layer = bool(getattr(weight, "is_embedding_or_output_parameter", False))
        with gathered(weight):
            self._adopt_tiles(weight, draw_tile or self._tile_cutter(weight))
        self.weight = None
        self._register_state_dict_hook(put_dense_weight)

    def _tile_cutter(self, weight: Tensor) -> DrawTile:
        def cut(o: int, i: int) -> Parameter:
            columns = self.grid.columns(i)
            tile = torch.cat([weight.detach()[rows, columns] for rows in self.grid.row_ranges(o)])
            return Parameter(tile, requires_grad=weight.requires_grad)

        return cut

    def _adopt_tiles(self, weight: Parameter, draw_tile: DrawTile) -> None:
        grid = self.grid

        def tile(o: int, i: int) -> WeightTile:
            parameter = draw_tile(o, i)
            _copy_attributes(parameter, weight)
            return WeightTile(parameter)

        # Made one at a time: under zero.Init each is partitioned before the next one is there.
        tiles = (tile(o, i) for o, i in grid.indices())
        container = PairedTiles if grid.paired else PartitionedTiles
        self.tiles = container(  # type: ignore[misc]
            grid.in_features,
            grid.out_features,
            bias=False,
            in_splits=grid.in_splits,
            out_splits=grid.out_splits,
            input_is_already_split=self.input_is_already_split,
            combine_out_splits=self.combine_out_splits,
            linear_cls=lambda *args, **kwargs: next(tiles),
        )
        self.tiles.in_parts, self.tiles.out_parts = grid.in_parts, grid.out_parts

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Stock's entries, with one a tile in place of the dense weight's."""
        dtype = self.tiles.linears[0][0].weight.dtype  # type: ignore[index]
        # Stock describes a weight of the dense shape: this one has no memory.
        self.weight = Parameter(torch.empty(self._shard_shape(), dtype=dtype, device="meta"), requires_grad=False)
        try:
            entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        finally:
            self.weight = None
        return sharded_tiles(self, entries, prefix, metadata)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the dense weight, or leaves it to the tiles' own keys, all of which must be there."""
        take_dense_weight(self, state_dict, prefix, error_msgs)
        if strict and not self.tiles_are_elsewhere:
            tiles = [[f"{prefix}tiles.linears.{o}.{i}.weight"] for o, i in self.grid.indices()]
            missing_keys += missing_weights(state_dict, prefix, tiles)
        rest = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    @property
    def tiles(self) -> PartitionedTiles:
        """The modules that own the tiles, ``tiles.linears[o][i].weight``."""
        return self._modules["tiles"]  # type: ignore[return-value]

    def _forward_impl(  # type: ignore[override]
        self,
        input: Tensor | Sequence[Tensor],
        weight: None,
        *,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **unused: Any,
    ) -> Tensor | list[Tensor]:
        if gradient_accumulation_fusion:
            raise ValueError(
                "a partitioned layer leaves its weight gradients to the engine; give --no-gradient-accumulation-fusion"
            )
        saving: AbstractContextManager[None] = nullcontext()
        if isinstance(input, Tensor):
            input, saving = column_input(input, sequence_parallel, allreduce_dgrad, tp_group)
        if self.input_is_already_split and isinstance(input, Tensor):
            input = [input[..., self.grid.columns(i)] for i in range(self.grid.in_splits)]
        with saving:
            result = self.tiles(input)
        if self.combine_out_splits:
            output: Tensor = result[0]
            return output if bias is None else output + bias.to(output.dtype)
        outputs = [output for output, _ in result]
        if bias is None:
            return outputs
        return [output + self._bias_of(o, bias).to(output.dtype) for o, output in enumerate(outputs)]

    def _bias_of(self, o: int, bias: Tensor) -> Tensor:
        return torch.cat([bias[rows] for rows in self.grid.row_ranges(o)])


class PartitionedColumnParallelLinear(_PartitionedParallelLinear, TiledColumnParallelLinear):
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

    def _init_with_one_column(self, input_size: int, output_size: int, options: dict[str, Any]) -> None:
        ColumnParallelLinear.__init__(self, 1, output_size, **(options | {"init_method": _nothing}))
        self.input_size = input_size

    def _tile_drawer(self, options: dict[str, Any]) -> DrawTile:
        options = options | {"bias": False, "stride": 1}
        tp = self.tp_group.size()

        def draw(o: int, i: int) -> Parameter:
            return ColumnParallelLinear(self.grid.in_size(i), self.grid.out_size(o) * tp, **options).weight

        return draw

    def forward(
        self, input_: Any, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """As ``TiledColumnParallelLinear.forward``.

        Raises:
            ValueError: as there; a weight is given.
        """
        if weight is not None:
            raise ValueError("a partitioned layer owns its tiles and takes no weight=; leave this layer dense")
        # Stock's forward asks for a weight and checks its shape: this one has no memory.
        stand_in = torch.empty(self.output_size_per_partition, self.input_size, device="meta")
        return super().forward(input_, weight=stand_in, runtime_gather_output=runtime_gather_output)


class PartitionedRowParallelLinear(_PartitionedParallelLinear, TiledRowParallelLinear):
    """``TiledRowParallelLinear`` whose tiles are parameters ``tiles.linears[o][i].weight``; its ``weight`` is None.

    See ``PartitionedColumnParallelLinear``.
    """

    stock_class = RowParallelLinear

    def _init_with_one_column(self, input_size: int, output_size: int, options: dict[str, Any]) -> None:
        group = get_tensor_model_parallel_group_if_none(
            options.get("tp_group"), is_expert=options.get("is_expert", False)
        )
        RowParallelLinear.__init__(self, group.size(), output_size, **(options | {"init_method": _nothing}))
        self.input_size, self.input_size_per_partition = input_size, input_size // group.size()

    def _tile_drawer(self, options: dict[str, Any]) -> DrawTile:
        options = options | {"bias": False, "stride": 1}
        tp = self.tp_group.size()

        def draw(o: int, i: int) -> Parameter:
            return RowParallelLinear(self.grid.in_size(i) * tp, self.grid.out_size(o), **options).weight

        return draw


PARTITIONED_CLASSES: dict[type[torch.nn.Module], type[_PartitionedParallelLinear]] = {
    ColumnParallelLinear: PartitionedColumnParallelLinear,
    RowParallelLinear: PartitionedRowParallelLinear,
}


def make_partitioned(layer: torch.nn.Module, grid: TileGrid) -> None:
    """Turn a built stock layer into a partitioned one, in place: its weight is copied into tiles, and let go.

    A weight that ZeRO-3 owns is gathered meanwhile; call this within ``deepspeed.zero.Init``, and the tiles are
    partitioned as they are made.
    """
    layer.__class__ = PARTITIONED_CLASSES[type(layer)]
    assert isinstance(layer, _PartitionedParallelLinear)
    layer.set_tiles(grid.in_splits, grid.out_splits, paired=grid.paired)
    layer.gradient_accumulation_fusion = False


def column_input(
    input_: Tensor, sequence_parallel: bool, allreduce_dgrad: bool, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, AbstractContextManager[None]]:
    """A column layer's collectives, once around all of its tiles.

    Returns:
        ``[s, b, h]`` of every rank's tokens, whose gradient is reduced, and a context for the tiles to run in.
    """
    if sequence_parallel:
        whole = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=group)
        return whole, regathered_in_backward(whole, input_, group)
    if allreduce_dgrad:
        return copy_to_tensor_model_parallel_region(input_, group=group), nullcontext()
    return input_, nullcontext()


def _nothing(weight: Tensor) -> None:
    """Draws nothing."""


def _copy_attributes(tile: Parameter, weight: Parameter) -> None:
    copy_tensor_model_parallel_attributes(tile, weight)
    for name in WEIGHT_ATTRIBUTES:
        if hasattr(weight, name):
            setattr(tile, name, getattr(weight, name))

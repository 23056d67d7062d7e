"""Dense checkpoints from tile parameters, and back: tiling never shows in what is saved.

* ``state_dict`` has the dense keys and weights wherever the tiles are plain parameters in memory. Tiles that an engine
  owns keep their own keys: ``state_dict`` is no collective, and an engine's own checkpoint needs its own parameters.
* ``sharded_state_dict`` has one entry a tile, under the tile's name, that points at the place of the tile, or of the
  rows of it that FSDP2 leaves this rank, in the dense weight: the key, global shape and replica ids are stock's.
  Nothing is merged or copied, and optimizers find the parameter they hold.
* ``load_state_dict`` takes dense weights as well as tiles; under ZeRO-3 one tile is gathered at a time.

A layer here is a partitioned layer: it has a ``grid`` and modules ``tiles.linears[o][i]`` with a ``weight`` each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.ownership import copy_param, gathered, is_owned


def tile_parameters(layer: Any) -> Iterator[tuple[int, int, Parameter]]:
    """``(o, i, parameter)`` of a partitioned layer."""
    return ((o, i, layer.tiles.linears[o][i].weight) for o, i in layer.grid.indices())


def dense_weight(layer: Any) -> Tensor:
    """The rank's dense shard ``[out, in]`` of a partitioned layer whose tiles are in memory, stock's order of rows."""
    grid: TileGrid = layer.grid
    _, _, some = next(tile_parameters(layer))
    dense = torch.empty(grid.out_features, grid.in_features, dtype=some.dtype, device=some.device)
    for o, i, tile in tile_parameters(layer):
        for rows, own_rows in _row_pieces(grid, o):
            dense[rows, grid.columns(i)] = tile.detach()[own_rows]
    return dense


@torch.no_grad()
def load_dense_weight(layer: Any, weight: Tensor) -> None:
    """Copy a rank's dense shard ``[out, in]`` into the tiles, one at a time; under ZeRO-3 a collective.

    Raises:
        ValueError: the shape differs.
    """
    grid: TileGrid = layer.grid
    if tuple(weight.shape) != (grid.out_features, grid.in_features):
        raise ValueError(f"cannot load {list(weight.shape)} into tiles of {[grid.out_features, grid.in_features]}")
    for o, i, tile in tile_parameters(layer):
        copy_param(tile, torch.cat([weight[rows, grid.columns(i)] for rows in grid.row_ranges(o)]))


def put_dense_weight(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state-dict hook: the dense weight, or what stands in for it, instead of the tiles where they are in memory."""
    weight: Tensor | None = layer.dense_stand_in
    if weight is None:
        if not all(in_memory(tile) for _, _, tile in tile_parameters(layer)):
            return
        weight = dense_weight(layer)
    rest = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict[f"{prefix}weight"] = weight
    state_dict |= {key: value for key, value in rest.items() if not key.startswith(f"{prefix}tiles.")}


def leave_to_dense_weights(unit: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state-dict hook of an MLP's tile, whose two layers save dense weights where it is in memory."""
    names = [name for name, parameter in unit.named_parameters() if in_memory(parameter)]
    for name in names:
        state_dict.pop(f"{prefix}{name}")


def take_dense_weight(
    layer: Any, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], _: Any, errors: list[str]
) -> None:
    """A hook before loading: takes the dense weight, or leaves it to the tiles' own keys, all of which must be."""
    if strict and not layer.tiles_are_elsewhere:
        tiles = [[f"{prefix}tiles.linears.{o}.{i}.weight"] for o, i in layer.grid.indices()]
        missing += missing_weights(state_dict, prefix, tiles)
    weight = state_dict.pop(f"{prefix}weight", None)
    if weight is not None:
        try:
            load_dense_weight(layer, weight)
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")


def missing_weights(state_dict: Mapping[str, Any], layer_prefix: str, tile_keys: Iterable[Sequence[str]]) -> list[str]:
    """What a strict load of one layer misses: the dense weight, or where there are tiles, those that are not.

    Args:
        layer_prefix: of the layer's keys.
        tile_keys: for each tile the keys under any of which it may be.
    """
    if state_dict.get(f"{layer_prefix}weight") is not None:
        return []
    tiles = list(tile_keys)
    missing = [keys[0] for keys in tiles if not any(key in state_dict for key in keys)]
    return [f"{layer_prefix}weight"] if len(missing) == len(tiles) else missing


def in_memory(parameter: Tensor) -> bool:
    """Whether a parameter is whole and nobody's but the module's."""
    owned = is_owned(parameter) or type(parameter) is not Parameter
    return not owned and parameter.untyped_storage().nbytes() > 0


def sharded_tiles(layer: Any, entries: dict[str, Any], prefix: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Stock's ``sharded_state_dict`` with the tiles in place of the dense weight.

    Args:
        layer: a partitioned layer.
        entries: what stock made of the layer, with a dense ``weight``, which may be on the meta device.
        prefix: of the keys.
        metadata: as stock takes it.

    Tiles that ZeRO-3 owns are gathered one by one, a collective, and copied to the CPU. Of tiles that FSDP2 shards,
    each rank has its rows.
    """
    dense: ShardedTensor = entries.pop(f"{prefix}weight")
    apart = bool((metadata or {}).get("singleton_local_shards", False))
    tiles = {}
    for o, i, tile in tile_parameters(layer):
        rows, first_row = _rows_here(tile)
        # No other rank has the rows of a shard.
        of_tile = replace(dense, replica_id=(*dense.replica_id[:-1], 0)) if isinstance(tile, DTensor) else dense
        name = f"{prefix}tiles.linears.{o}.{i}.weight"
        tiles[name] = _tile_entry(of_tile, layer.grid, o, i, rows, first_row, apart)
    if layer.is_output_layer:
        entries[f"{prefix}weight"] = _WholeWeight(list(tiles.values()))
    return tiles | entries


def local_tensor(parameter: Tensor) -> Tensor:
    """The very object that a DTensor shards, by which stock's entries and optimizers tell a parameter."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def _rows_here(tile: Parameter) -> tuple[Tensor, int]:
    """The rows of a tile that this rank saves and loads, and the first of them: those of its FSDP2 shard, or all."""
    if is_owned(tile):
        with gathered(tile):
            return tile.detach().to("cpu", copy=True), 0
    if isinstance(tile, DTensor):
        ranks = tile.device_mesh
        return local_tensor(tile), ranks.get_local_rank() * -(-tile.shape[0] // ranks.size())  # as torch.chunk has it
    return tile, 0


def _tile_entry(
    dense: ShardedTensor, grid: TileGrid, o: int, i: int, rows_here: Tensor, first_row: int, apart: bool
) -> Any:
    """The place of a tile, or of its rows from ``first_row`` on, in the dense weight.

    A paired tile is two places; ``apart`` gives gate and up a key each.
    """
    pieces = list(_row_pieces(grid, o, first_row, first_row + rows_here.shape[0]))

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        return [
            _at(dense, key, data[own_rows], rows.start, grid.columns(i).start, replica_id, grid.paired, apart)
            for rows, own_rows in pieces
        ]

    def merge(loaded: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(part.shape[-2:]) for part in loaded])

    if grid.paired or dense.prepend_axis_num:
        return ShardedTensorFactory(dense.key, rows_here, build, merge, dense.replica_id)
    (entry,) = build(dense.key, rows_here, dense.replica_id, None)
    entry.data = rows_here  # the very object, by which optimizers find their entry
    return entry


def _at(
    dense: ShardedTensor, key: str, data: Tensor, row: int, column: int, replica_id: Any, paired: bool, apart: bool
) -> ShardedTensor:
    axis = dense.prepend_axis_num
    shape, offset = list(dense.global_shape), list(dense.global_offset)
    if paired:  # globally, all ranks' gates are above all ranks' ups
        half, row = divmod(row, dense.local_shape[0] // 2)
        shape[axis] //= 2
        offset[axis] = offset[axis] // 2 + row
        if apart:
            key += ("_w", "_v")[half]
        else:
            offset[axis] += half * shape[axis]
            shape[axis] *= 2
    else:
        offset[axis] += row
    offset[axis + 1] += column
    data = data.reshape(*[1] * axis, *data.shape)  # Megatron prepends axes to regular grids only
    return replace(
        dense,
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # tiles may be uneven
        replica_id=replica_id,
        prepend_axis_num=0,
    )


class _WholeWeight(LocalNonpersistentObject):
    """Stands in a model's sharded state dict where it looks for the output layer's weight; nothing is saved for it."""

    def __init__(self, tiles: list[ShardedTensor]) -> None:
        super().__init__(None)
        self._tiles = tiles

    @property
    def allow_shape_mismatch(self) -> bool:
        """Whether the padded vocabulary may differ; models set it."""
        return self._tiles[0].allow_shape_mismatch

    @allow_shape_mismatch.setter
    def allow_shape_mismatch(self, value: bool) -> None:
        for tile in self._tiles:
            tile.allow_shape_mismatch = value


def _row_pieces(grid: TileGrid, o: int, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Rows of the dense weight, and which of the tile's rows from ``first`` to ``last`` they are."""
    start = 0
    for rows in grid.row_ranges(o):
        stop = start + rows.stop - rows.start
        begin, end = max(start, first), stop if last is None else min(stop, last)
        if begin < end:
            yield slice(rows.start + begin - start, rows.start + end - start), slice(begin - first, end - first)
        start = stop

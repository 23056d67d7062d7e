"""Tile keys and dense keys: the state dicts of DeepSpeed's ``TiledLinear`` and of stock layers, one rank's at a time.

A tiled layer ``NAME`` has keys ``NAME.linears.<o>.<i>.weight``, and ``NAME.linears.<o>.<last i>.bias``. Under tensor
parallelism every tile is a parallel layer of its own, so the weight of all ranks together is tile-major. But what a
rank computes with is its tiles side by side, and that is the shard of a dense layer with the same output. So each
rank is converted by itself, the number of ranks stays, and joining the ranks tile by tile would be another model.
"""

import re
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.config import MODULE_OF_ATTRIBUTE, ROW_MODULES
from megatron_tiling.tiles.grid import partition_uniform

State = dict[str, Tensor]
Splits = Mapping[str, tuple[int, int]]

TILE_KEY = re.compile(r"(.+)\.linears\.(\d+)\.(\d+)\.(weight|bias)")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> State:
    """Nested state dicts, as Megatron-DeepSpeed saves them, as one with dotted keys; what is no tensor is left out.

    Raises:
        ValueError: two entries have the same dotted key.
    """
    flat: State = {}
    for key, value in tree.items():
        entries = {}
        if isinstance(value, Mapping):
            entries = flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            entries = {f"{prefix}{key}": value}
        for twice in flat.keys() & entries.keys():
            raise ValueError(f"{twice} is there twice")
        flat |= entries
    return flat


def is_tiled(state: Mapping[str, Any]) -> bool:
    """Whether a flat state dict has tile keys."""
    return any(TILE_KEY.fullmatch(key) for key in state)


def join_tiles(state: Mapping[str, Tensor]) -> State:
    """One rank's state dict with each tiled layer's weight and bias in one piece; other entries are kept.

    Raises:
        ValueError: a tile is missing or there twice, or does not have the dtype of its neighbours and the shape that
            they leave it; names the layer.
    """
    joined: State = {}
    layers: dict[str, dict[str, dict[tuple[int, int], Tensor]]] = {}
    for key, value in state.items():
        match = TILE_KEY.fullmatch(key)
        if match is None:
            joined[key] = value
            continue
        name, out_tile, in_tile, kind = match.groups()
        if f"{name}.{kind}" in state:
            raise ValueError(f"there is {name}.{kind}, and in tiles {key}")
        joined.setdefault(f"{name}.{kind}", value)  # holds the layer's place
        of_kind = layers.setdefault(name, {"weight": {}, "bias": {}})[kind]
        if of_kind.setdefault((int(out_tile), int(in_tile)), value) is not value:
            raise ValueError(f"{key} is there twice")
    for name, tiles in layers.items():
        joined[f"{name}.weight"] = _joined_weight(name, tiles["weight"])
        if tiles["bias"]:
            joined[f"{name}.bias"] = _joined_bias(name, tiles["bias"], tiles["weight"])
    return joined


def _joined_weight(name: str, tiles: Mapping[tuple[int, int], Tensor]) -> Tensor:
    out_splits, in_splits = (max(index[axis] for index in tiles) + 1 if tiles else 1 for axis in (0, 1))
    for o, i in product(range(out_splits), range(in_splits)):
        key = f"linears.{o}.{i}.weight"
        if (o, i) not in tiles:
            raise ValueError(f"{name}: there is no {key}, in a grid of {out_splits} out-tiles and {in_splits} in-tiles")
        tile, wanted = tiles[o, i], (tiles[o, 0].shape[0], tiles[0, i].shape[-1])
        if tile.dtype != tiles[0, 0].dtype:
            raise ValueError(f"{name}: {key} is {tile.dtype}, beside {tiles[0, 0].dtype}")
        if tile.shape != wanted or 0 in tile.shape:
            raise ValueError(f"{name}: {key} is {list(tile.shape)}, between tiles that need {list(wanted)}")
    rows = [torch.cat([tiles[o, i] for i in range(in_splits)], dim=1) for o in range(out_splits)]
    return torch.cat(rows)


def _joined_bias(name: str, biases: Mapping[tuple[int, int], Tensor], tiles: Mapping[Any, Tensor]) -> Tensor:
    out_splits, last = max(index[0] for index in tiles) + 1, max(index[1] for index in tiles)
    if sorted(biases) != [(o, last) for o in range(out_splits)]:
        raise ValueError(
            f"{name}: out-tiles have their bias in the last in-tile, one each, but it is in linears."
            + ", ".join(f"{o}.{i}" for o, i in sorted(biases))
        )
    for o in range(out_splits):
        if biases[o, last].shape != tiles[o, last].shape[:1]:
            raise ValueError(f"{name}: linears.{o}.{last}.bias is {list(biases[o, last].shape)}, not as its weight")
    return torch.cat([biases[o, last] for o in range(out_splits)])


def split_tiles(state: Mapping[str, Tensor], splits: Splits, tensor_parallel: int) -> State:
    """One rank's state dict with the chosen layers in tiles, as ``TiledLinear`` over parallel layers cuts them.

    Args:
        state: dense, with megatron-core's names.
        splits: ``{module: (in_splits, out_splits)}``.
        tensor_parallel: ranks that share a layer.

    Raises:
        ValueError: a split exceeds the features, makes tiles that the ranks cannot share evenly, or is of a module
            that is not there.
    """
    tiled: State = {}
    there = {MODULE_OF_ATTRIBUTE.get(key.rpartition(".")[0].rpartition(".")[2], "") for key in state}
    if missing := [module for module in splits if module not in there]:
        raise ValueError(f"--tiled-linear-splits {missing[0]}=...: there is no such layer; leave it out")
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        module = MODULE_OF_ATTRIBUTE.get(name.rpartition(".")[2], "")
        if module not in splits or kind not in ("weight", "bias"):
            tiled[key] = value
            continue
        in_splits, out_splits = splits[module]
        rows = _sizes(key, value.shape[0], out_splits, 1 if module in ROW_MODULES else tensor_parallel)
        if kind == "bias":
            tiled |= {f"{name}.linears.{o}.{in_splits - 1}.bias": b.clone() for o, b in enumerate(value.split(rows))}
            continue
        columns = _sizes(key, value.shape[1], in_splits, tensor_parallel if module in ROW_MODULES else 1)
        for o, row in enumerate(value.split(rows)):
            for i, tile in enumerate(row.split(columns, dim=1)):
                tiled[f"{name}.linears.{o}.{i}.weight"] = tile.clone()  # a view would be saved with all of the weight
    return tiled


def _sizes(key: str, local: int, splits: int, ranks: int) -> list[int]:
    """This rank's features of each tile, given its features of the layer."""
    if not 1 <= splits <= local * ranks:
        raise ValueError(f"{key}: {splits} tiles of {local * ranks} features; give at most that many")
    bounds = partition_uniform(local * ranks, splits)
    if any(bound % ranks for bound in bounds):
        raise ValueError(
            f"{key}: {splits} tiles of {local * ranks} features cannot be shared by {ranks} ranks each; "
            f"choose a number of tiles that divides {local}"
        )
    return [(stop - start) // ranks for start, stop in pairwise(bounds)]

"""Tile keys and dense keys: the state dicts of DeepSpeed's ``TiledLinear`` and of stock layers, one rank's at a time.

A tiled layer ``NAME`` has keys ``NAME.linears.<o>.<i>.weight``, and ``NAME.linears.<o>.<last i>.bias``. Under tensor
parallelism every tile is a parallel layer of its own, so the weight of all ranks together is tile-major. But what a
rank computes with is its tiles side by side, and that is the shard of a dense layer with the same output. So each
rank is converted by itself, the number of ranks stays, and joining the ranks tile by tile would be another model.

Names are megatron-core's (``decoder.layers.0.mlp.linear_fc1``) or those of Megatron-DeepSpeed and of Megatron-LM
before megatron-core (``language_model.encoder.layers.0.mlp.dense_h_to_4h``).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.grid import partition_uniform

State = dict[str, Tensor]
Splits = Mapping[str, tuple[int, int]]

TILE_KEY = re.compile(r"(.+)\.linears\.(\d+)\.(\d+)\.(weight|bias)")
#: Last name of a layer, of either kind -> what flags call it, and which of ``[out, in]`` the ranks share out.
MODULE_OF_LAYER = {
    "linear_qkv": ("qkv", 0),
    "linear_proj": ("proj", 1),
    "linear_fc1": ("fc1", 0),
    "linear_fc2": ("fc2", 1),
    "output_layer": ("output", 0),
}
#: Megatron-DeepSpeed's names -> megatron-core's: at the top, and within a layer.
TOP_NAMES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.final_layernorm.": "decoder.final_layernorm.",
    "language_model.output_layer.": "output_layer.",
}
LAYER_PREFIXES = ("language_model.encoder.layers.", "decoder.layers.")
LAYER_NAMES = {
    "input_layernorm.": "input_layernorm.",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "pre_mlp_layernorm.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}
#: Other spellings of some of these names: Megatron-LM 1 and 2, and layers with TransformerEngine's fused norms.
SPELLINGS = {
    "language_model.transformer.": "language_model.encoder.",
    ".attention.": ".self_attention.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
#: What a GPT model has, in megatron-core's names: at the top, and within a layer.
TOP_ENTRY = re.compile(
    r"embedding\.(word|position|tokentype)_embeddings\.weight|(decoder\.final_layernorm|output_layer)\.(weight|bias)"
)
LAYER_ENTRY = re.compile(
    r"decoder\.layers\.(\d+)\.((input|pre_mlp|post_\w+)_layernorm\.(weight|bias)|mlp\.linear_fc[12]\.(weight|bias)|"
    r"self_attention\.((linear_qkv|linear_proj|[qk]_layernorm)\.(weight|bias)|core_attention\.softmax_offset))"
)
#: Entries that are computed anew, or describe a kernel's state.
NOT_CONVERTED = (".inv_freq", "._extra_state")


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


def nest(state: State) -> dict[str, Any]:
    """The nesting in which Megatron-DeepSpeed's GPT model loads its weights; the opposite of ``flatten``."""
    nested: dict[str, Any] = {}
    for key, value in state.items():
        depth = 3 if key.startswith("language_model.embedding.") else 2
        *path, name = key.split(".", depth)
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return nested


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
    for index in ((o, i) for o in range(out_splits) for i in range(in_splits)):
        if index not in tiles:
            raise ValueError(
                f"{name}: there is no linears.{index[0]}.{index[1]}.weight, "
                f"in a grid of {out_splits} out-tiles and {in_splits} in-tiles"
            )
        shape, wanted = tuple(tiles[index].shape), (tiles[index[0], 0].shape[0], tiles[0, index[1]].shape[-1])
        if tiles[index].dtype != tiles[0, 0].dtype:
            raise ValueError(
                f"{name}: linears.{index[0]}.{index[1]}.weight is {tiles[index].dtype}, beside {tiles[0, 0].dtype}"
            )
        if shape != wanted or 0 in shape:
            raise ValueError(
                f"{name}: linears.{index[0]}.{index[1]}.weight is {list(shape)}, between tiles that need {list(wanted)}"
            )
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
        ValueError: a split exceeds the features, or makes tiles that the ranks cannot share evenly.
    """
    tiled: State = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        module, sharded = MODULE_OF_LAYER.get(name.rpartition(".")[2], ("", 0))
        if module not in splits or kind not in ("weight", "bias"):
            tiled[key] = value
            continue
        in_splits, out_splits = splits[module]
        rows = _sizes(key, value.shape[0], out_splits, tensor_parallel if sharded == 0 else 1)
        if kind == "bias":
            tiled |= {f"{name}.linears.{o}.{in_splits - 1}.bias": b.clone() for o, b in enumerate(value.split(rows))}
            continue
        columns = _sizes(key, value.shape[1], in_splits, tensor_parallel if sharded == 1 else 1)
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


def uses_core_names(keys: Iterable[str]) -> bool:
    """Whether entries have megatron-core's names, and not those of Megatron before its core."""
    return not any(key.startswith("language_model.") for key in keys)


def core_names(state: Mapping[str, Tensor]) -> State:
    """Dense entries under megatron-core's names, whichever they have. Tables that are computed anew are left out.

    Raises:
        ValueError: an entry that a GPT model does not have, or two that are the same one, naming them.
    """
    named: State = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        if key.endswith(NOT_CONVERTED):
            continue
        name = _core_name(key)
        if not (TOP_ENTRY.fullmatch(name) or LAYER_ENTRY.fullmatch(name)):
            raise ValueError(f"{key} is no entry of a GPT model that can be converted")
        if origin.setdefault(name, key) != key:
            raise ValueError(f"{origin[name]} and {key} are one entry of the model, {name}")
        named[name] = value
    return named


def check_model(state: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int | None]], layers: int | None) -> None:
    """Refuse weights that cannot be those of one model, such as a layer without its last tiles.

    Args:
        state: dense, with megatron-core's names.
        sizes: shapes that are known, by an entry's name (in a layer: within it); ``None`` for a size that is not.
        layers: how many there are, if that is known.

    Raises:
        ValueError: a layer is missing, or differs from the first in entries, shapes or dtypes; a shape is not as in
            ``sizes``, or does not fit its neighbours'; naming the entry.
    """
    found: dict[int, State] = {}
    for key, value in state.items():
        if value.numel() == 0:
            raise ValueError(f"{key} is empty")
        if match := LAYER_ENTRY.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    count = len(found) if layers is None else layers
    for number in sorted(found.keys() ^ set(range(count))):
        raise ValueError(f"layer {number} is {'one too many' if number in found else 'missing'}, of {count} layers")
    for number, entries in found.items():
        for name in sorted(entries.keys() ^ found[0].keys()):
            there, lacking = (number, 0) if name in entries else (0, number)
            raise ValueError(f"layer {there} has {name}, and layer {lacking} has none")
        for name, value in entries.items():
            first = found[0][name]
            if (value.shape, value.dtype) != (first.shape, first.dtype):
                raise ValueError(f"layer {number}: {name} is {_described(value)}, and {_described(first)} in layer 0")
    shapes = {name: tuple(value.shape) for name, value in (dict(state) | found.get(0, {})).items()}
    _check_shapes(shapes, sizes)
    _check_shapes(shapes, _sizes_by_neighbours(shapes))


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Sequence[int | None]]) -> None:
    for name, wanted in sizes.items():
        shape = shapes.get(name, wanted)
        if len(shape) != len(wanted) or any(want not in (None, size) for size, want in zip(shape, wanted, strict=True)):
            shown = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(f"{name} is {list(shape)}, and the rest of the model needs [{shown}]: is a tile missing?")


def _sizes_by_neighbours(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Sequence[int | None]]:
    words, hidden = shapes.get("embedding.word_embeddings.weight", (None, None))
    (hidden,) = shapes.get("input_layernorm.weight", (hidden,))
    _, ffn = shapes.get("mlp.linear_fc2.weight", (None, None))
    rows, _ = shapes.get("mlp.linear_fc1.weight", (None, None))
    return {
        "self_attention.linear_qkv.weight": (None, hidden),
        "self_attention.linear_proj.weight": (hidden, None),
        "mlp.linear_fc1.weight": (rows if ffn and rows == 2 * ffn else ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, None),
        "output_layer.weight": (words, hidden),
    }


def _described(value: Tensor) -> str:
    return f"{list(value.shape)} of {value.dtype}"


def deepspeed_names(state: Mapping[str, Tensor]) -> State:
    """Entries, dense or in tiles, under Megatron-DeepSpeed's names, given megatron-core's."""
    top, within = _swapped(TOP_NAMES), _swapped(LAYER_NAMES)
    return {_renamed(key, top, LAYER_PREFIXES[::-1], within): value for key, value in state.items()}


def _core_name(key: str) -> str:
    for old, new in SPELLINGS.items():
        key = key.replace(old, new)
    if uses_core_names([key]):
        return key
    return _renamed(key, TOP_NAMES, LAYER_PREFIXES, LAYER_NAMES)


def _renamed(key: str, top: Mapping[str, str], layers: Sequence[str], within: Mapping[str, str]) -> str:
    start, names, prefix = "", top, ""
    if match := re.match(rf"{re.escape(layers[0])}(\d+)\.", key):
        start, names, prefix = match[0], within, f"{layers[1]}{match[1]}."
    for old, new in names.items():
        if key.startswith(start + old):
            return prefix + new + key.removeprefix(start + old)
    raise ValueError(f"{key} is no entry of a GPT model that can be converted")


def _swapped(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def reorder_qkv(state: Mapping[str, Tensor], version: float, heads: int | None) -> State:
    """Query, key and value rows in today's order, ``[heads, (q, k, v), head size]`` on each rank.

    Args:
        version: ``checkpoint_version`` as Megatron saves it. Below 2 the order was ``[(q, k, v), heads, head size]``
            (version 0, or none) or ``[heads, head size, (q, k, v)]`` (version 1).
        heads: attention heads of this rank.

    Raises:
        ValueError: the version is unknown, or it needs ``heads``, which are not known or do not divide the rows.
    """
    if version not in (0, 1, 2, 3):
        raise ValueError(f"checkpoint_version {version} is not known: the order of query, key and value is unclear")
    if version >= 2:
        return dict(state)
    ordered = dict(state)
    for key, value in state.items():
        if ".linear_qkv." not in key:
            continue
        if heads is None or value.shape[0] % (3 * heads):
            raise ValueError(
                f"{key}: checkpoint_version {version} has query, key and value in another order, and its "
                f"{value.shape[0]} rows cannot be sorted for {heads or 'an unknown number of'} heads on each rank"
            )
        size = value.shape[0] // (3 * heads)
        shape = (3, heads, size) if version == 0 else (heads, size, 3)
        axes = (0, 1) if version == 0 else (1, 2)
        ordered[key] = value.view(*shape, *value.shape[1:]).transpose(*axes).reshape(value.shape).contiguous()
    return ordered

"""The entries of a GPT model: megatron-core's names and older ones, and what makes them one model.

Names are megatron-core's (``decoder.layers.0.mlp.linear_fc1``) or those of Megatron-DeepSpeed and of Megatron-LM
before megatron-core (``language_model.encoder.layers.0.mlp.dense_h_to_4h``).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_tiling.tiles.deepspeed_keys import State

#: How Megatron-DeepSpeed's entries begin -> how megatron-core's do; N is the layer's number.
NAMES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.final_layernorm.": "decoder.final_layernorm.",
    "language_model.output_layer.": "output_layer.",
} | {
    f"language_model.encoder.layers.N.{deepspeed}.": f"decoder.layers.N.{core}."
    for deepspeed, core in {
        "input_layernorm": "input_layernorm",
        "self_attention.query_key_value": "self_attention.linear_qkv",
        "self_attention.dense": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
    }.items()
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
    names = {core: deepspeed for deepspeed, core in NAMES.items()}
    return {_renamed(key, names): value for key, value in state.items()}


def _core_name(key: str) -> str:
    for old, new in SPELLINGS.items():
        key = key.replace(old, new)
    return key if uses_core_names([key]) else _renamed(key, NAMES)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", key)
    for old, new in names.items():
        start, other = (name.replace("N", layer[1] if layer else "N") for name in (old, new))
        if key.startswith(start):
            return other + key.removeprefix(start)
    raise ValueError(f"{key} is no entry of a GPT model that can be converted")


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

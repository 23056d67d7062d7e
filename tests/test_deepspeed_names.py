"""The names of a GPT model's entries, and what is no model's state dict."""

from types import SimpleNamespace

import pytest
import torch
from megatron.training.checkpointing import _transpose_first_dim
from torch import Tensor

from megatron_tiling import deepspeed_names
from megatron_tiling.config import MODULE_OF_ATTRIBUTE
from megatron_tiling.tiles import deepspeed_keys


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_old_orders_of_query_key_and_value(version: float, columns: tuple[int, ...]) -> None:
    heads, size = 4, 2
    value = torch.randn(3 * heads * size, *columns)
    attention = SimpleNamespace(hidden_size_per_attention_head=size, num_attention_heads_per_partition=heads)
    layer = SimpleNamespace(self_attention=attention)
    model = SimpleNamespace(language_model=SimpleNamespace(encoder=SimpleNamespace(layers=[layer])))
    key = "decoder.layers.0.self_attention.linear_qkv." + ("weight" if columns else "bias")
    found = deepspeed_names.reorder_qkv({key: value}, version, heads)[key]
    assert torch.equal(found, value if version >= 2 else _transpose_first_dim(value, 3, version == 0, model))


def test_unknown_orders_and_names_are_refused() -> None:
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(ValueError, match=r"checkpoint_version 4.0 is not known"):
        deepspeed_names.reorder_qkv({}, 4.0, 2)
    with pytest.raises(ValueError, match="an unknown number of heads"):
        deepspeed_names.reorder_qkv({key: torch.ones(6, 2)}, 0, None)
    for name in ("lm_head.weight", "decoder.layers.0.mlp.router.weight", "decoder.extra", "output_layer.scale"):
        with pytest.raises(ValueError, match=f"{name} is no entry"):
            deepspeed_names.core_names({name: torch.ones(1)})
    one, other = (f"language_model.encoder.layers.0.{name}.dense.weight" for name in ("attention", "self_attention"))
    with pytest.raises(ValueError, match=f"{one} and {other} are one entry"):
        deepspeed_names.core_names({one: torch.ones(1), other: torch.ones(1)})


def test_names_of_old_versions() -> None:
    names = {
        "language_model.transformer.layers.1.attention.dense.bias": "decoder.layers.1.self_attention.linear_proj.bias",
        "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight": "decoder.layers.0.self_attention.q_layernorm.weight",
    }
    assert list(deepspeed_names.core_names(dict.fromkeys(names, torch.ones(1)))) == list(names.values())


def model(layers: int = 2, rows: int = 8, hidden: int = 4) -> dict[str, Tensor]:
    """A rank's dense state dict."""
    state = {
        "embedding.word_embeddings.weight": torch.ones(6, hidden),
        "output_layer.weight": torch.ones(6, hidden),
    }
    for layer in range(layers):
        prefix = f"decoder.layers.{layer}."
        state[f"{prefix}input_layernorm.weight"] = torch.ones(hidden)
        state[f"{prefix}self_attention.linear_qkv.weight"] = torch.ones(3 * hidden, hidden)
        state[f"{prefix}self_attention.linear_proj.weight"] = torch.ones(hidden, hidden)
        state[f"{prefix}mlp.linear_fc1.weight"] = torch.ones(rows, hidden)
        state[f"{prefix}mlp.linear_fc2.weight"] = torch.ones(hidden, 8)
    return state


@pytest.mark.parametrize("rows", [8, 16])  # 16: gated
def test_a_whole_model_passes(rows: int) -> None:
    deepspeed_names.check_model(model(rows=rows), {}, None)
    deepspeed_names.check_model(model(rows=rows), {"mlp.linear_fc1.weight": (rows, 4)}, 2)


@pytest.mark.parametrize(
    ("name", "splits"), [("mlp.linear_fc1", (1, 4)), ("mlp.linear_fc2", (1, 4)), ("mlp.linear_fc2", (4, 1))]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_without_its_last_tiles_is_refused(name: str, splits: tuple[int, int], layers: int) -> None:
    module = MODULE_OF_ATTRIBUTE[name.rpartition(".")[2]]
    tiled = deepspeed_keys.split_tiles(model(layers), {module: splits}, 1)
    last = f"decoder.layers.0.{name}.linears.{splits[1] - 1}.{splits[0] - 1}.weight"
    joined = deepspeed_keys.join_tiles({key: value for key, value in tiled.items() if key != last})
    with pytest.raises(ValueError, match=r"mlp.linear_fc[12].weight is"):
        deepspeed_names.check_model(joined, {}, None)


def test_what_is_no_model_is_refused() -> None:
    qkv, whole = "decoder.layers.1.self_attention.linear_qkv.weight", model()
    for faulty, words in (
        ({key: value for key, value in whole.items() if ".0." not in key}, "layer 0 is missing, of 1 layers"),
        (
            {key: value for key, value in whole.items() if key != qkv},
            "layer 0 has self_attention.linear_qkv.weight, an",
        ),
        (
            whole | {qkv.replace("weight", "bias"): torch.ones(12)},
            "layer 1 has self_attention.linear_qkv.bias, and lay",
        ),
        (
            whole | {qkv: whole[qkv].bfloat16()},
            r"layer 1: self_attention.linear_qkv.weight is \[12, 4\] of torch.bfloat16",
        ),
        (whole | {qkv: torch.empty(0)}, f"{qkv} is empty"),
        (whole | {"output_layer.weight": torch.ones(5, 4)}, r"output_layer.weight is \[5, 4\], and .* needs \[6, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            deepspeed_names.check_model(faulty, {}, None)
    with pytest.raises(ValueError, match="layer 2 is missing, of 3 layers"):
        deepspeed_names.check_model(whole, {}, 3)
    with pytest.raises(ValueError, match=r"qkv.weight is \[12, 4\], and the rest of the model needs \[16, any\]"):
        deepspeed_names.check_model(whole, {"self_attention.linear_qkv.weight": (16, None)}, 2)

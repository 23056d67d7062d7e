"""tiled_layer_spec as its callers call it, and what TiledSpecProvider replaces (training: trainer/test_training)."""

import functools
import importlib.util
import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_tiling import spec
from megatron_tiling.config import VARIABLE
from megatron_tiling.partitioned.layers import PartitionedColumnParallelLinear
from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.spec import TiledSpecProvider, tiled_layer_spec

CONFIG = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, transformer_impl="local", normalization="RMSNorm"
)
PROVIDER = type("GPTModelProvider", (TransformerConfig,), {})(
    num_layers=2, hidden_size=32, num_attention_heads=4, transformer_impl="local", normalization="RMSNorm"
)
MODEL_CONFIG = Namespace(transformer=CONFIG)
ARGS = Namespace(spec=("megatron_tiling.spec", "tiled_layer_spec"), transformer_impl="local", num_experts=None)
CALLS: dict[str, Callable[[], Any]] = {
    "Megatron 0.19": lambda: tiled_layer_spec(MODEL_CONFIG, vp_stage=None),
    "Megatron-Bridge": lambda: tiled_layer_spec(PROVIDER, vp_stage=None),
    "slime": lambda: tiled_layer_spec(ARGS, CONFIG, None),
    "by keyword": lambda: tiled_layer_spec(config=CONFIG),
    "model config by keyword": lambda: tiled_layer_spec(config=MODEL_CONFIG, vp_stage=None),
    "extra keywords": lambda: tiled_layer_spec(CONFIG, use_transformer_engine=False, pre_process=True, role="actor"),
    "extra arguments": lambda: tiled_layer_spec("actor", None, ARGS, CONFIG),
}


@pytest.fixture(autouse=True)
def only_pipeline_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)


def classes(node: Any, found: list[type] | None = None) -> list[type]:
    """All classes in a tree of specs."""
    found = [] if found is None else found
    if isinstance(node, type):
        found.append(node)
    elif isinstance(node, functools.partial):
        for value in node.keywords.values():
            classes(value, found)
    elif isinstance(node, (list, tuple)):
        for value in node:
            classes(value, found)
    elif isinstance(node, ModuleSpec) or type(node).__name__.endswith("Submodules"):
        for value in vars(node).values():
            classes(value, found)
    return found


def test_settings_of_the_environment_are_said_to_be_without_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiled_layer_spec(CONFIG)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(VARIABLE, "factor=8")
    tiled_layer_spec(CONFIG)
    assert "MEGATRON_TILING has no effect on --spec megatron_tiling.spec: fc1 and fc2 have 4" in capsys.readouterr().out


@pytest.mark.feature(
    "`--spec megatron_tiling.spec tiled_layer_spec`, as Megatron-Bridge and slime call it", page="integrations"
)
@pytest.mark.parametrize("caller", CALLS)
def test_any_call_with_a_config_gives_the_tiled_layers(caller: str) -> None:
    block = CALLS[caller]()
    assert len(block.layer_specs) == 2
    for layer in block.layer_specs:
        kinds = classes(layer)
        assert sum(issubclass(kind, TiledColumnParallelLinear) for kind in kinds) == 1  # fc1
        assert sum(issubclass(kind, TiledRowParallelLinear) for kind in kinds) == 1  # fc2
        assert kinds.count(ColumnParallelLinear) == kinds.count(RowParallelLinear) == 1  # qkv, proj


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((ARGS, CONFIG, 1), {}, {"vp_stage": 1}),
        ((MODEL_CONFIG,), {"vp_stage": 0}, {"vp_stage": 0}),
        ((ARGS, CONFIG), {"vp_stage": 2}, {"vp_stage": 2}),
        ((ARGS, CONFIG, None, True), {}, {"vp_stage": None}),
        ((CONFIG,), {"normalization": "LayerNorm", "role": "actor"}, {"normalization": "LayerNorm"}),
        ((CONFIG,), {"pp_rank": 3, "qk_l2_norm": True}, {"pp_rank": 3, "qk_l2_norm": True}),
    ],
)
def test_stage_and_options_reach_megatrons_function(
    arguments: tuple[Any, ...], options: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    stock = spec.get_gpt_decoder_block_spec

    @functools.wraps(stock)
    def record(config: Any, **settings: Any) -> Any:
        seen.update(settings, config=config)
        return ModuleSpec(module=object)

    monkeypatch.setattr(spec, "get_gpt_decoder_block_spec", record)
    tiled_layer_spec(*arguments, **options)
    defaults = {"use_transformer_engine": False, "normalization": "RMSNorm", "qk_l2_norm": False, "vp_stage": None}
    assert seen == {"config": CONFIG} | defaults | expected


def test_megatron_sees_that_it_takes_a_stage() -> None:
    """0.19 and Megatron-Bridge give ``vp_stage`` to functions that have a parameter of this name."""
    assert "vp_stage" in inspect.signature(tiled_layer_spec).parameters


@pytest.mark.parametrize(
    ("arguments", "options"), [((), {}), ((ARGS, 1), {"vp_stage": 0}), ((ARGS,), {"config": ARGS})]
)
def test_a_call_without_a_config_is_refused(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"tiled_layer_spec: none of the arguments is, or has as .transformer, a Trans"):
        tiled_layer_spec(*arguments, **options)


def test_transformer_engine_needs_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    with pytest.raises(SystemExit, match="TransformerEngine is not installed; install it, or use --transformer-impl"):
        tiled_layer_spec(config)


def test_the_provider_gives_each_module_its_grid_and_leaves_the_given_spec() -> None:
    given = get_gpt_layer_local_spec()
    provider = TiledSpecProvider(factor=3, splits={"fc1": (2, 8), "proj": (5, 1)}, modules="all")
    layer = provider.tiled(given)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.keywords["submodules"]
    expected = {
        "linear_qkv": TiledColumnParallelLinear.with_splits(1, 3),
        "linear_proj": TiledRowParallelLinear.with_splits(5, 1),
        "linear_fc1": TiledColumnParallelLinear.with_splits(2, 8),
        "linear_fc2": TiledRowParallelLinear.with_splits(3, 1),
    }
    for name, kind in expected.items():
        assert vars(attention if hasattr(attention, name) else mlp)[name] is kind
    assert {ColumnParallelLinear, RowParallelLinear} <= set(classes(given))


def test_down_projections_of_multi_latent_attention_stay_stock() -> None:
    layer = TiledSpecProvider(modules="all").tiled(get_gpt_layer_local_spec(multi_latent_attention=True))
    attention = layer.submodules.self_attention.submodules
    assert attention.linear_q_down_proj is ColumnParallelLinear
    assert issubclass(attention.linear_q_up_proj, TiledColumnParallelLinear)
    config = MLATransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, transformer_impl="local")
    assert TiledRowParallelLinear.with_splits(4, 1, True) in classes(tiled_layer_spec(config).layer_specs)


def test_partitioned_layers_by_spec() -> None:
    kinds = classes(TiledSpecProvider(storage="partitioned").tiled(get_gpt_layer_local_spec()))
    assert sum(issubclass(kind, PartitionedColumnParallelLinear) for kind in kinds) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0}, "--tile-factor 0: "),
        ({"factor": "4"}, "--tile-factor '4': "),
        ({"storage": "disk"}, "--tiled-linear-storage 'disk': "),
        ({"splits": {"experts": (1, 2)}}, "TiledSpecProvider: experts are not tiled by a spec"),
        ({"modules": ("fc1", "experts")}, "TiledSpecProvider: experts are not tiled by a spec"),
        ({"splits": {"gate": (1, 2)}}, "--tiled-linear-splits gate=1x2: gate is not among the modules"),
    ],
)
def test_bad_settings_of_the_provider_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        TiledSpecProvider(**settings)
    assert str(refusal.value).startswith(message)

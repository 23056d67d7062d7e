"""All of a model is checked before any of it is changed; whole models are converted in check_models.py."""

# ruff: noqa: F401 - the fixture of test_mlp is used by name

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_tiling import TilingConfig, tile
from megatron_tiling.partitioned.checkpoint import tile_parameters
from megatron_tiling.report import note
from megatron_tiling.resident.layers import TiledColumnParallelLinear
from megatron_tiling.resident.lm_head import TiledOutputLayer
from megatron_tiling.resident.mlp import TiledMLP
from megatron_tiling.spec import TiledSpecProvider
from megatron_tiling.tiles.ownership import tags
from tests.check_models import make_config
from tests.support.gathered import tile_modules
from tests.tiles.test_mlp import world_of_one


def gpt(tied: bool = False, rewrite: Callable[[Any], Any] = lambda spec: spec, **changes: Any) -> Any:
    """2 layers of 40 features, a vocabulary of 64."""
    spec = rewrite(get_gpt_layer_local_spec())
    return GPTModel(make_config(**changes), spec, 64, 12, share_embeddings_and_output_weights=tied)


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Whatever a conversion changes: classes, attributes and hooks of modules, parameters, the state dict."""
    modules = {
        name: (type(module), {key: id(value) for key, value in vars(module).items()}, len(module._state_dict_hooks))
        for name, module in model.named_modules()
    }
    parameters = {name: (id(parameter), vars(parameter).copy()) for name, parameter in model.named_parameters()}
    return {"modules": modules, "parameters": parameters, "keys": list(model.state_dict())}


def with_late_shards(model: Any) -> None:
    model.output_layer.gtp_remat_size = 2


def in_a_list_beside_a_fine_one(model: Any) -> Any:
    return torch.nn.ModuleList([gpt(), torch.nn.ModuleDict({"inner": model})])


#: Settings, changes of the config and the model, and what the error says.
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any] | None, str]] = {
    "output in columns": ({"splits": {"output": (2, 1)}}, {}, None, "output=2x1"),
    "more tiles than the vocabulary": ({"splits": {"output": (1, 65)}}, {}, None, "output=1x65"),
    "a grid of the last layer": ({"splits": {"fc2": (41, 1)}}, {}, None, "fc2=41x1"),
    "odd halves": (
        {"splits": {"fc1": (1, 41)}, "storage": "partitioned"},
        {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
        None,
        "fc1=1x41",
    ),
    "more kept tiles than there are": ({"mlp_keep": 5}, {}, None, "--tiled-mlp-keep 5"),
    "kept tiles, partitioned": ({"mlp_keep": 5, "storage": "partitioned"}, {}, None, "--tiled-mlp-keep 5"),
    "deferred weight gradients": (
        {},
        {},
        lambda model: setattr(model.config, "defer_embedding_wgrad_compute", True),
        "--defer-embedding-wgrad-compute",
    ),
    "products of one order": (
        {},
        {},
        lambda model: setattr(model.config, "batch_invariant_mode", True),
        "--batch-invariant-mode",
    ),
    "sharded weights": ({}, {}, with_late_shards, "--tensor-parallel-num-weight-shards"),
    "one model of two": ({"splits": {"output": (2, 1)}}, {}, in_a_list_beside_a_fine_one, "output=2x1"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_model_is_not_changed(refusal: str) -> None:
    settings, changes, change, words = REFUSALS[refusal]
    model = gpt(**changes)
    model = (change and change(model)) or model
    before = state(model)
    with pytest.raises(ValueError, match=words):
        tile(model, TilingConfig(**settings))
    assert state(model) == before


def test_what_is_tiled_already_is_reported_as_it_is() -> None:
    model = gpt()
    first = tile(model, TilingConfig(factor=3, mlp_keep=1))
    before = state(model)
    assert tile(model, TilingConfig(factor=2)) == first
    assert state(model) == before
    assert isinstance(model.output_layer, TiledOutputLayer) and isinstance(model.decoder.layers[0].mlp, TiledMLP)


def test_one_rank_has_nothing_to_overlap() -> None:
    model = gpt()
    for tiling in (TilingConfig(tp_overlap=4), TilingConfig()):
        fc1, *_ = (report for report in tile(model, tiling) if report.name.endswith("linear_fc1"))
        assert note(fc1).endswith("at most 4 tiles, no overlap: one tensor-parallel rank")
    reports = {report.module: report for report in tile(gpt(), TilingConfig(tp_overlap=4))}
    for module in ("qkv", "proj"):
        assert str(reports[module].grid) == "1x1" and note(reports[module]) == "no overlap: one tensor-parallel rank"
    mlp = model.decoder.layers[0].mlp
    assert mlp.overlap_steps == 4 and mlp.steps_now(torch.zeros(8192, 1, 32), None) == 1


def has_fewer_if_small(model: Any) -> bool:
    mlp = model.decoder.layers[0].mlp
    assert isinstance(mlp, TiledMLP)
    return mlp.keep is None and mlp.linear_fc1.fewer_if_small and mlp.linear_fc2.fewer_if_small


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "keep all, at most 4 tiles"),
        ({"mlp_keep": "all"}, "keep all, at most 4 tiles"),
        ({"factor": 4}, "keep all, at most 4 token steps"),
        ({"splits": {"fc1": (1, 4)}}, "keep all, at most 4 token steps"),
        ({"splits": {"output": (1, 8)}}, "keep all, at most 4 tiles"),
        ({"mlp_keep": 1}, "keep 1, at most 4 token steps"),
    ],
)
def test_tiles_are_a_number_at_most_where_none_is_given(settings: dict[str, Any], words: str) -> None:
    model = gpt()
    for _ in range(2):
        fc1, *_ = (report for report in tile(model, TilingConfig(**settings)) if report.name.endswith("linear_fc1"))
        assert str(fc1.grid) == "1x4" and note(fc1) == f"TiledMLP, {words}"
    assert has_fewer_if_small(model) == ("tiles" in words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "TiledMLP, keep all, at most 4 tiles"),
        ({"factor": 4}, "TiledMLP, keep all, at most 4 token steps"),
        ({"splits": {"fc2": (4, 1)}}, "TiledMLP, keep all, at most 4 token steps"),
        ({"storage": "partitioned"}, "partitioned, TiledMLP, keep all"),
    ],
)
def test_tiles_of_layers_built_from_a_spec_are_as_many_as_it_says(settings: dict[str, Any], words: str) -> None:
    model = gpt(rewrite=TiledSpecProvider(**settings).tiled)
    fc1, *_ = (report for report in tile(model, TilingConfig()) if report.name.endswith("linear_fc1"))
    assert str(fc1.grid) == "1x4" and note(fc1) == words
    assert has_fewer_if_small(model) == ("tiles" in words)


@pytest.mark.parametrize("given", [{"factor": 4}, {"splits": {"fc1": (1, 4)}}, {}])
def test_tiles_of_a_layer_tiled_before_are_as_many_as_was_said(given: dict[str, Any]) -> None:
    model = gpt()
    tile(model, TilingConfig(modules=("fc1",), **given))
    tile(model, TilingConfig())
    assert has_fewer_if_small(model) == (not given)


def test_what_was_tiled_without_overlap_says_so() -> None:
    model = gpt()
    tile(model, TilingConfig(modules="all"))
    notes = {report.module: note(report) for report in tile(model, TilingConfig(tp_overlap=4))}
    assert notes["qkv"] == notes["proj"] == "no overlap: it was tiled without"


def test_kept_tiles_of_mlps_that_stay_stock_refuse_nothing() -> None:
    reports = tile(gpt(), TilingConfig(mlp_keep=5, splits={"fc1": (2, 2)}))
    (fc2, *_) = (report for report in reports if report.name.endswith("linear_fc2"))
    assert fc2.mlp is None and "do not match" in fc2.reason


def test_another_fused_loss_keeps_logits_whole() -> None:
    model = gpt(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    (head,) = (report for report in tile(model, TilingConfig()) if report.name == "output_layer")
    assert head.reason == "--cross-entropy-fusion-impl te" and head.loss_tiles is None
    assert not isinstance(model.output_layer, TiledOutputLayer)


def test_an_output_that_is_wider_than_its_input_stays_dense() -> None:
    """Megatron's main branch has ``--output-logit-dtype fp32``."""
    model = gpt(params_dtype=torch.bfloat16)
    for dtype, grid in ((torch.float32, "None"), (torch.bfloat16, "1x4")):
        model.output_layer.output_dtype = dtype
        (head,) = (report for report in tile(model, TilingConfig()) if report.name == "output_layer")
        assert str(head.grid) == grid and head.reason.startswith(
            "--output-logit-dtype torch.float32: " * (grid == "None")
        )


def test_an_output_that_is_wider_than_its_input_is_refused_where_it_is_made() -> None:
    """By a layer that was told so after it was tiled."""
    model = gpt()
    tile(model, TilingConfig())
    layer = model.decoder.layers[0].mlp.linear_fc1
    options = {"bias": None, "gradient_accumulation_fusion": False, "allreduce_dgrad": False, "tp_group": None}
    options |= {"sequence_parallel": False, "grad_output_buffer": None}
    hidden = torch.ones(2, 1, layer.input_size)
    assert layer._forward_impl(hidden, layer.weight, output_dtype=torch.float32, **options).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^--output-logit-dtype torch.float64: tiles write their output in the dtype"):
        layer._forward_impl(hidden, layer.weight, output_dtype=torch.float64, **options)


def test_a_layer_without_a_weight_is_not_partitioned() -> None:
    layer = ColumnParallelLinear(
        8, 8, config=make_config(), init_method=torch.nn.init.normal_, bias=False, skip_weight_param_allocation=True
    )
    (report,) = tile(torch.nn.ModuleDict({"output_layer": layer}), TilingConfig(storage="partitioned"))
    assert report.grid is None and report.reason == "has no weight of its own"
    assert type(layer) is ColumnParallelLinear


def test_shared_layers_are_tiled_once() -> None:
    model = gpt()
    model.decoder.layers[1] = model.decoder.layers[0]
    reports = tile(model, TilingConfig())
    assert len([report for report in reports if report.name.endswith("linear_fc1")]) == 1
    assert isinstance(model.decoder.layers[1].mlp.linear_fc1, TiledColumnParallelLinear)


@pytest.mark.parametrize("tied", [True, False])
def test_partitioned_tiles_have_whatever_the_weight_was_tagged_with(tied: bool) -> None:
    model = gpt(tied)
    for name, parameter in model.named_parameters():
        parameter.grad_norm_group, parameter.tag_of_a_later_megatron = "mtp", (name,)  # type: ignore[attr-defined]
    weights = dict(model.named_parameters())
    reports = [report for report in tile(model, TilingConfig(storage="partitioned")) if report.partitioned]
    assert len(reports) == (8 if tied else 9)
    for report in reports:
        for _, _, parameter in tile_parameters(model.get_submodule(report.name)):
            assert vars(parameter) == vars(weights[f"{report.name}.weight"])
    assert len(tile_modules(model)) == 4 * len(reports) - 8  # tiles of fc1 and fc2 are one


def test_tags_of_an_owned_parameter_are_not_its_engines() -> None:
    """The attributes that DeepSpeed 0.19 gives a parameter."""
    parameter = torch.nn.Parameter(torch.zeros(0))
    for name, value in {"ds_id": 3, "ds_shape": (4, 4), "is_external_param": False, "nvme_swapper": None}.items():
        setattr(parameter, name, value)
    parameter.all_gather = lambda: None  # type: ignore[attr-defined]
    parameter.allreduce, parameter.grad_norm_group = True, "mtp"  # type: ignore[attr-defined]
    assert tags(parameter) == {"allreduce": True, "grad_norm_group": "mtp"}


class Adapter(torch.nn.Module):
    """As Megatron-Bridge (``to_wrap``) and peft (``base_layer``) put one around a layer; adds nothing."""

    def __init__(self, layer: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.inner_name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.inner_name)(*args, **kwargs)


@pytest.mark.parametrize("name", ["to_wrap", "base_layer"])
def test_layers_under_adapters_are_tiled(name: str) -> None:
    """Adapters stay, two of them around one layer too; a head under one gives whole logits."""
    model, dense = gpt(), gpt()
    attention, mlp = model.decoder.layers[0].self_attention, model.decoder.layers[1].mlp
    attention.linear_qkv = qkv = Adapter(Adapter(attention.linear_qkv, name), name)
    mlp.linear_fc1, model.output_layer = Adapter(mlp.linear_fc1, name), Adapter(model.output_layer, name)
    reports = {report.name: report for report in tile(model, TilingConfig(factor=2, modules="all"))}
    assert attention.linear_qkv is qkv
    assert [report.name for report in tile(dense, TilingConfig(factor=2))] == list(reports)
    assert all(report.grid is not None for report in reports.values())
    assert reports["output_layer"].reason == "an adapter is around the output layer"
    assert reports["decoder.layers.1.mlp.linear_fc1"].reason == (
        "linear_fc1 has an adapter around it that runs by itself: Adapter is no LoRA that the loop knows"
    )
    assert reports["decoder.layers.0.mlp.linear_fc1"].mlp == "decoder.layers.0.mlp"


def test_a_model_without_tiles_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and name != "output_layer":
            layer.__class__ = type("TheirLinear", (type(layer),), {})
    tile(model, TilingConfig(factor=2))
    words = "warning: none of the 4 linear layers of GPTModel is tiled: TheirLinear is not a stock column or row layer"
    assert capsys.readouterr().out == f"megatron_tiling: {words}\n"
    tile(gpt(), TilingConfig(factor=2))
    tile(gpt(), TilingConfig(modules=("output",)))
    assert not capsys.readouterr().out


def test_a_weight_that_another_module_has_too_is_not_partitioned() -> None:
    model = gpt()
    first, second = (layer.mlp.linear_fc1 for layer in model.decoder.layers)
    second.weight = first.weight
    reports = {report.name: report for report in tile(model, TilingConfig(storage="partitioned"))}
    for index in range(2):
        assert reports[f"decoder.layers.{index}.mlp.linear_fc1"].reason == "its weight is another module's too"
        assert reports[f"decoder.layers.{index}.mlp.linear_fc2"].partitioned
    assert first.weight is second.weight is not None


@pytest.mark.parametrize("name", ["linear_fc1", "linear_fc2"])
def test_a_weight_that_a_partitioned_layer_is_given_is_refused(name: str) -> None:
    model = gpt()
    tile(model, TilingConfig(storage="partitioned"))
    mlp = model.decoder.layers[0].mlp
    layer = getattr(mlp, name)
    layer.weight = torch.nn.Parameter(torch.ones(1, 1))
    for call in (lambda: mlp(torch.ones(2, 1, 32)), lambda: layer(torch.ones(2, 1, layer.grid.in_features))):
        with pytest.raises(RuntimeError, match="was given a weight, which nothing reads"):
            call()


def test_a_product_that_somebody_replaced_keeps_layers_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ColumnParallelLinear, "_forward_impl", lambda self, **call: call["input"])
    reports = tile(gpt(), TilingConfig())
    assert {report.grid for report in reports} == {None}
    (fc1, *_) = (report for report in reports if report.module == "fc1")
    assert fc1.reason.startswith("ColumnParallelLinear._forward_impl is not Megatron's own, but of ")


def test_an_output_layer_of_another_vocabulary() -> None:
    """Rows that are added after the model was tiled."""
    logits = []
    for tiled in (False, True):
        torch.manual_seed(0)
        model = gpt()
        if tiled:
            tile(model, TilingConfig())
        model.output_layer.weight = torch.nn.Parameter(torch.linspace(-1, 1, 80 * 32).view(80, 32))
        hidden = torch.linspace(-1, 1, 3 * 32).view(3, 1, 32)
        logits.append(model.output_layer(hidden)[0])
    assert logits[1].shape == (3, 1, 80)
    assert torch.allclose(*logits, atol=1e-5)

"""Settings that no layer of a model follows are said below its table, and end no run."""

# ruff: noqa: F401 - the fixture of test_mlp is used by name

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tiling import TilingConfig, tile, tiling_hook
from megatron_tiling.config import FLAGS
from megatron_tiling.report import LayerReport
from megatron_tiling.unused import settings_without_effect
from tests.test_convert import gpt
from tests.tiles.test_mlp import world_of_one

#: Settings, changes of the model, and the flags that are said to be without effect.
UNUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"modules": ("fc1", "fc2", "experts")}, {}, ["--tiled-linear-modules experts"]),
    ({"splits": {"experts": (1, 8)}}, {}, ["--tiled-linear-splits experts=8"]),
    ({"factor": 2, "modules": ("output",)}, {}, ["--tile-factor 2"]),
    ({"factor": 2, "modules": ("qkv", "proj"), "tp_overlap": 4}, {}, ["--tile-factor 2"]),
    ({"factor": 2, "modules": ("fc1", "fc2"), "splits": {"fc1": (1, 4), "fc2": (4, 1)}}, {}, ["--tile-factor 2"]),
    ({"fp32_accumulate": True}, {}, ["--tiled-linear-fp32-accumulate"]),
    (
        {"fp32_accumulate": True, "modules": ("output",)},
        {"params_dtype": torch.bfloat16},
        ["--tiled-linear-fp32-accumulate"],
    ),
    ({"fp32_accumulate": True, "factor": 1}, {"params_dtype": torch.bfloat16}, ["--tiled-linear-fp32-accumulate"]),
    ({"mlp_keep": 1, "splits": {"fc1": (2, 2)}}, {}, ["--tiled-mlp-keep 1"]),
    ({"mlp_keep": "all", "modules": ("experts",)}, {}, ["--tiled-linear-modules experts", "--tiled-mlp-keep all"]),
    (
        {"head_memory_mib": 9, "head_keep": 0, "head_tokens": 3},
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
        ["--tiled-head-memory-mib 9", "--tiled-head-keep 0", "--tiled-head-tokens 3"],
    ),
    ({"fp8_hold_weights": True}, {}, ["--tiled-fp8-hold-weights"]),
    ({"tp_overlap": 4, "modules": ("fc1", "fc2"), "splits": {"fc1": (2, 2)}}, {}, ["--tiled-tp-overlap 4"]),
]
FOLLOWED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"modules": "all"}, {}),
    ({"factor": 2, "mlp_keep": 1}, {}),
    ({"factor": 2, "modules": ("fc1", "fc2"), "splits": {"fc2": (4, 1)}}, {}),
    ({"splits": {"output": (1, 8)}, "head_memory_mib": 9, "head_keep": "all", "head_tokens": 3}, {}),
    ({"fp32_accumulate": True}, {"params_dtype": torch.bfloat16}),
    ({"fp32_accumulate": True, "modules": ("qkv",)}, {"params_dtype": torch.bfloat16}),
    ({"tp_overlap": "auto"}, {}),  # the table says of each layer why not
    ({"tp_overlap": "off", "mlp_keep": "all"}, {}),
    ({"storage": "partitioned", "mlp_keep": 0, "factor": 2}, {}),
]


def lines(settings: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    config = TilingConfig(**settings)
    return settings_without_effect(config, tile(gpt(**changes), config))


@pytest.mark.parametrize(("settings", "changes", "flags"), UNUSED)
def test_settings_that_nothing_follows(settings: dict[str, Any], changes: dict[str, Any], flags: list[str]) -> None:
    assert [line.partition(" has no effect here: ")[0] for line in lines(settings, changes)] == flags


@pytest.mark.parametrize(("settings", "changes"), FOLLOWED)
def test_settings_that_something_follows(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    assert lines(settings, changes) == []


def test_each_flag_is_tried() -> None:
    """Where tiles live is for each layer to say."""
    tried = {flag.split()[0] for *_, flags in UNUSED for flag in flags}
    assert tried == set(FLAGS.values()) - {"--tiled-linear-storage"}


def test_experts_follow() -> None:
    experts = LayerReport("decoder.layers.0.mlp.experts", (8, 8), 2, experts=4, expert_tiles=3, kept_tiles=1)
    followed = TilingConfig(3, mlp_keep=1, fp32_accumulate=True)
    assert settings_without_effect(followed, [experts]) == []
    own = TilingConfig(2, ("experts",), {"experts": (1, 3)}, mlp_keep=1)
    assert settings_without_effect(own, [experts]) == ["--tile-factor 2 has no effect here: no layer has tiles by it"]
    held = TilingConfig(modules=("experts",), fp8_hold_weights=True)
    assert settings_without_effect(held, [replace(experts, fp8=True)]) == []
    (line,) = settings_without_effect(held, [experts])
    assert line == "--tiled-fp8-hold-weights has no effect here: no MLP and no experts run in tiles in FP8"


def test_what_was_tiled_before_stays_as_it_is() -> None:
    model = gpt()
    tile(model, TilingConfig(4, mlp_keep="all", head_memory_mib=8))
    other = TilingConfig(2, mlp_keep=1, head_memory_mib=9)
    flags = [line.partition(" has")[0] for line in settings_without_effect(other, tile(model, other))]
    assert flags == ["--tile-factor 2", "--tiled-mlp-keep 1", "--tiled-head-memory-mib 9"]


def test_a_stage_without_layers_says_nothing() -> None:
    assert settings_without_effect(TilingConfig(2, ("experts",), mlp_keep=1), []) == []


def test_they_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    tiling_hook(TilingConfig(splits={"experts": (1, 8)}))([gpt()])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "--tiled-linear-splits experts=8 has no effect here: there are none in grouped GEMMs (--moe-grouped-gemm); "
        "experts one by one are fc1 and fc2"
    )

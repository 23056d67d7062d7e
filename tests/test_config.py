"""TilingConfig by hand: its values and what is refused by name, and that it can be hashed, pickled and copied."""

import copy
import dataclasses
import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from megatron_tiling import TilingConfig
from megatron_tiling.config import FLAGS, MODULES, parse_splits, storage_of

WHOLE = "must be a whole number of at least"
NO_NUMBERS = ("2", 2.0, 2.5, True, np.float64(2), [2], -1)


def test_defaults() -> None:
    config = TilingConfig()
    assert [config.splits_of(module) for module in MODULES] == [(1, 4), (4, 1), (1, 4), (4, 1), (1, 4), (1, 4)]
    assert (
        config.tiled_modules == ("fc1", "fc2", "experts", "output")
        and TilingConfig(storage="partitioned").tiled_modules == MODULES
    )
    overlap = TilingConfig(tp_overlap=4)
    assert overlap.tiled_modules == MODULES and TilingConfig(tp_overlap="off").tiled_modules == config.tiled_modules
    assert (
        TilingConfig(tp_overlap="auto").tiled_modules == MODULES and TilingConfig(tp_overlap="auto").overlap_steps == 4
    )
    assert [overlap.splits_of(module) for module in MODULES] == [(1, 1), (1, 1), (1, 4), (4, 1), (1, 4), (1, 4)]
    assert TilingConfig(tp_overlap=4, splits={"qkv": (1, 2)}).splits_of("qkv") == (1, 2)
    assert config.splits == {} and config.kept_tiles is None and not config.partitioned


@pytest.mark.parametrize(
    "config",
    [TilingConfig(), TilingConfig(factor=2, modules=["fc1", "fc2"], splits={"fc1": [2, 8]}, mlp_keep=0)],  # type: ignore
    ids=["default", "with splits"],
)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), dataclasses.replace]
)
def test_hashed_pickled_and_copied(config: TilingConfig, copied: Callable[[TilingConfig], TilingConfig]) -> None:
    twin = copied(config)
    assert twin == config and hash(twin) == hash(config) and {config: "found"}[twin] == "found"
    with pytest.raises(TypeError, match="read-only"):
        twin.splits["fc1"] = (1, 1)  # type: ignore[index]


def test_equal_configs_are_one_key_and_others_are_not() -> None:
    one = TilingConfig(splits={"fc1": (1, 8), "fc2": (8, 1)})
    assert len({one, TilingConfig(splits={"fc2": (8, 1), "fc1": (1, 8)}), TilingConfig()}) == 2


def test_as_a_dict() -> None:
    config = TilingConfig(splits={"fc1": (2, 8)}, mlp_keep=3)
    settings = dataclasses.asdict(config)
    assert settings["splits"] == {"fc1": (2, 8)} and settings["modules"] is None
    assert TilingConfig(**settings) == config
    assert TilingConfig(**json.loads(json.dumps(settings))) == config


def test_splits_are_read_only_and_the_configs_own() -> None:
    given = {"fc1": (1, 8)}
    config = TilingConfig(splits=given)
    given["fc1"] = (1, 2)
    assert config.splits_of("fc1") == (1, 8)
    for change in (
        lambda splits: splits.update(fc1=(1, 2)),
        lambda splits: splits.pop("fc1"),
        lambda splits: splits.popitem(),
        lambda splits: splits.clear(),
        lambda splits: splits.setdefault("fc2", (1, 2)),
        lambda splits: splits.__delitem__("fc1"),
        lambda splits: splits.__ior__({"fc1": (1, 2)}),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change(config.splits)
    assert config.splits == {"fc1": (1, 8)}
    assert TilingConfig(splits=MappingProxyType({"fc1": (1, 8)})) == config


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = TilingConfig(factor=np.int64(8), mlp_keep=np.int32(2), splits={"fc1": (np.int64(1), np.int64(2))})  # type: ignore
    assert config == TilingConfig(factor=8, mlp_keep=2, splits={"fc1": (1, 2)})
    assert type(config.factor) is int and type(config.kept_tiles) is int and type(config.splits["fc1"][1]) is int


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("factor", (*NO_NUMBERS, 0, np.int64(0)), f"{WHOLE} 1"),
        ("mlp_keep", (*NO_NUMBERS, "none", "ALL", np.int64(-1)), f"{WHOLE} 0, or all"),
        ("head_memory_mib", (*NO_NUMBERS, 0), f"{WHOLE} 1"),
        ("head_keep", (*NO_NUMBERS, "none", "ALL", np.int64(-1)), f"{WHOLE} 0, or all"),
        ("head_tokens", (*NO_NUMBERS, 0), f"{WHOLE} 1"),
        ("tp_overlap", (*NO_NUMBERS, 0, 1, "on", np.int64(1)), f"{WHOLE} 2, auto, or off"),
        ("fp32_accumulate", (1, 0, "yes", None), "must be True or False"),
        ("fp8_hold_weights", (1, 0, "yes", None), "must be True or False"),
        ("storage", ("auto", "disk", None, ["resident"]), "must be resident or partitioned; the flag alone"),
        (
            "modules",
            ("fc1", (), ("fc1", "mlp"), (1,), {"fc1"}, ("fc1", "fc1"), ("all", "fc1"), ("all", "all")),
            "must be some of qkv, proj, fc1",
        ),
        (
            "splits",
            ([("fc1", (1, 2))], "fc1=1x2", None, {"fc1": 2}, {"fc1": "12"}, {"fc1": (1, 2, 3)}, {"fc1": (1, 2.0)},
             {"fc1": (0, 2)}, {"fc1": (True, 2)}),
            "must be {module: (in_splits, out_splits)}, whole numbers of at least 1",
        ),
    ],
)  # fmt: skip
def test_values_of_other_types_and_out_of_range(field: str, values: tuple[Any, ...], words: str) -> None:
    for value in values:
        with pytest.raises(ValueError) as refusal:
            TilingConfig(**{field: value})
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else repr(value)
        assert str(refusal.value).startswith(f"{FLAGS[field]} {shown}: ") and words in str(refusal.value)


@pytest.mark.parametrize("modules", ["all", ["all"], MODULES])
def test_all_modules(modules: Any) -> None:
    assert TilingConfig(modules=modules).tiled_modules == MODULES


def test_fuse_wgrad_has_no_flag() -> None:
    with pytest.raises(ValueError, match=r"^fuse_wgrad 'yes': must be True, False or None"):
        TilingConfig(fuse_wgrad="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": ("fc1",), "splits": {"fc2": (2, 1)}}, "--tiled-linear-splits fc2=2x1: fc2 is not among"),
        ({"modules": ("fc1",), "mlp_keep": 0}, "--tiled-mlp-keep: fc1 and fc2 are not both tiled"),
        ({"storage": "partitioned", "splits": {"experts": (1, 2)}}, "--tiled-linear-splits experts=2: partitioned"),
        ({"modules": ("fc1",), "splits": {"experts": (1, 2)}}, "--tiled-linear-splits experts=2: experts is not among"),
        ({"splits": {"experts": (2, 1)}}, "--tiled-linear-splits experts=(2, 1): experts have one number of tiles"),
        ({"modules": ("fc1",), "head_tokens": 5}, "--tiled-head-tokens: the output layer is not tiled"),
        ({"modules": ("fc1",), "head_memory_mib": 5}, "--tiled-head-memory-mib: the output layer is not tiled"),
        ({"storage": "partitioned", "head_tokens": 5}, "--tiled-head-tokens: a partitioned output layer makes whole"),
        ({"storage": "partitioned", "head_memory_mib": 5}, "--tiled-head-memory-mib: a partitioned output layer makes"),
        ({"modules": ("fc1",), "head_keep": 0}, "--tiled-head-keep: the output layer is not tiled"),
        (
            {"splits": {"output": (1, 4)}, "head_tokens": 5, "head_keep": 1, "head_memory_mib": 5},
            "--tiled-head-memory-mib: --tiled-head-tokens, --tiled-linear-splits output=... and --tiled-head-keep 1",
        ),
        ({"storage": "partitioned", "fp32_accumulate": True}, "--tiled-linear-fp32-accumulate: autograd and the"),
        ({"storage": "partitioned", "fuse_wgrad": True}, "fuse_wgrad=True: autograd and the engine"),
        ({"storage": "partitioned", "fp8_hold_weights": True}, "--tiled-fp8-hold-weights: partitioned tiles are not"),
        ({"modules": ("fc1",), "fp8_hold_weights": True}, "--tiled-fp8-hold-weights: fc1 and fc2 are not both tiled"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        TilingConfig(**settings)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "setting",
    [
        "fc1",
        "fc1=8",
        "fc1=1x2x3",
        "fc1=1x-2",
        "fc1=0x2",
        "fc1=1x",
        "fc1=axb",
        "fc1=1.0x2",
        "fc1=\uff11x2",
        "experts=1x4",
        "experts=0",
        "experts",
    ],
)
def test_malformed_splits(setting: str) -> None:
    with pytest.raises(ValueError, match=f"^--tiled-linear-splits {setting}: write MODULE=INxOUT, both whole numbers"):
        parse_splits([setting])


@pytest.mark.parametrize("modules", [["fc1", "fc2"], ["fc1,fc2"], ["fc1, fc2"], "fc1 fc2"])
@pytest.mark.parametrize("splits", [["fc1=1x8", "fc2=8x1"], ["fc1=1x8,fc2=8x1"], ["fc1=1x8, fc2=8x1"]])
def test_blanks_or_commas_between_modules(modules: Any, splits: list[str]) -> None:
    """The environment variable has commas, and a shell's or a file's word may have blanks."""
    args = Namespace(tiled_linear_modules=modules, tiled_linear_splits=splits)
    assert TilingConfig.from_args(args) == TilingConfig(None, ("fc1", "fc2"), {"fc1": (1, 8), "fc2": (8, 1)})
    with pytest.raises(ValueError, match=r"^--tiled-linear-modules fc1 fc2 fc3: must be some of"):
        TilingConfig.from_args(Namespace(tiled_linear_modules=["fc1,fc2", "fc3"]))


def test_an_empty_word_names_no_module() -> None:
    with pytest.raises(ValueError, match=r"^--tiled-linear-modules : must be some of"):
        TilingConfig.from_args(Namespace(tiled_linear_modules=[""]))
    with pytest.raises(ValueError, match=r"^--tiled-linear-splits : write MODULE=INxOUT"):
        parse_splits([""])


def test_tiles_of_experts_are_one_number() -> None:
    config = TilingConfig(splits=parse_splits(["experts=8", "fc1=1x2"]))
    assert config.splits_of("experts") == (1, 8) and config.setting_of("experts") == "experts=8"
    assert TilingConfig(modules=("experts",), mlp_keep=2).kept_tiles == 2
    assert TilingConfig(modules=("qkv", "proj", "experts"), mlp_keep=2, tp_overlap=3).kept_tiles == 2
    assert TilingConfig(modules=("experts",), fp8_hold_weights=True).fp8_hold_weights


def test_storage_follows_the_engine_unless_it_is_given() -> None:
    fsdp = {"tiled_linear_storage": None, "use_megatron_fsdp": True}
    for strategy, storage in (("optim_grads_params", "partitioned"), ("optim_grads", "resident")):
        assert storage_of(Namespace(**fsdp, data_parallel_sharding_strategy=strategy)) == storage
    assert storage_of(Namespace(tiled_linear_storage="auto", use_torch_fsdp2=True)) == "partitioned"
    assert storage_of(Namespace(tiled_linear_storage="resident", use_torch_fsdp2=True)) == "resident"
    assert storage_of(Namespace()) == "resident"


@pytest.mark.parametrize(("keep", "tiles"), [("all", None), (0, 0), (3, 3)])
def test_mlp_keep(keep: Any, tiles: int | None) -> None:
    assert TilingConfig(mlp_keep=keep).kept_tiles == tiles
    assert TilingConfig(storage="partitioned").kept_tiles == 0


def test_arguments_that_lack_our_flags_give_the_defaults() -> None:
    """As those of a framework with a parser of its own, or from ``--yaml-cfg``."""
    assert TilingConfig.from_args(Namespace()) == TilingConfig()
    assert TilingConfig.from_args(Namespace(tile_factor=2), mlp_keep=0) == TilingConfig(factor=2, mlp_keep=0)
    with pytest.raises(ValueError, match=r"^--tile-factor 0: "):
        TilingConfig.from_args(Namespace(tile_factor=0))

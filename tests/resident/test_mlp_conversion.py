"""Which MLPs run in tiles: conversion, its refusals, and children that send a TiledMLP to Megatron's own path."""

# ruff: noqa: F401, F811 - the fixtures of test_mlp are used by name

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_tiling import TilingConfig, tile
from megatron_tiling.resident.layers import TiledColumnParallelLinear
from megatron_tiling.resident.mlp import convert_mlp
from tests.tiles.test_mlp import (
    ACTIVATIONS,
    SWIGLU,
    Loops,
    assert_same,
    clone,
    loops,
    small_token_steps,
    step,
    stock_mlp,
    tiled,
    with_tiled_layers,
    world_of_one,
)


def test_ddp_pre_hooks_run_first_and_in_order(loops: Loops) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3)
    expected = step(stock)
    gathered = {name: parameter.detach().clone() for name, parameter in mlp.named_parameters()}
    order = []

    def gather(module: torch.nn.Module, *unused: Any) -> None:
        (name,) = (name for name, child in mlp.named_children() if child is module)
        order.append(name)
        module.weight.data.copy_(gathered[f"{name}.weight"])

    gather.__module__ = "megatron.core.distributed.distributed_data_parallel"
    for child in (mlp.linear_fc2, mlp.linear_fc1):
        child.weight.data.zero_()  # stale until the hook ran
        child.register_forward_pre_hook(gather)
    assert_same(step(mlp), expected)
    assert order == ["linear_fc1", "linear_fc2"]
    assert loops.count == 1


def _replace_by_lora(mlp: MLP) -> None:
    class Lora(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = self.base(hidden)
            return output + 0 * output, bias

    mlp.linear_fc1 = Lora(mlp.linear_fc1)


STOCK_PATHS = {
    "lora": _replace_by_lora,
    "forward hook": lambda mlp: mlp.linear_fc1.register_forward_hook(lambda *args: None),
    "backward hook": lambda mlp: mlp.linear_fc2.register_full_backward_hook(lambda *args: None),
    "pre-hook that reads": lambda mlp: mlp.linear_fc2.register_forward_pre_hook(lambda module, args: args[0] * 1),
    "patched forward": lambda mlp: setattr(mlp.linear_fc1, "forward", mlp.linear_fc1.forward),
    "subclass": lambda mlp: setattr(mlp.linear_fc2, "__class__", RowParallelLinear),
}


@pytest.mark.parametrize("change", STOCK_PATHS)
def test_stock_path_of_changed_children(change: str, loops: Loops) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3)
    STOCK_PATHS[change](mlp)
    assert mlp.reason_for_stock_forward().startswith("linear_fc")
    found, expected = ({name: done[name] for name in ("output", "hidden")} for done in (step(mlp), step(stock)))
    assert_same(found, expected)
    assert loops.count == 0


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return run


REPLACED = {
    "the MLP": (MLP, "forward"),
    "column layers": (ColumnParallelLinear, "forward"),
    "row layers": (RowParallelLinear, "forward"),
    "products of column layers": (ColumnParallelLinear, "_forward_impl"),
    "the product": (layers, "linear_with_grad_accumulation_and_async_allreduce"),
    "the copy to ranks": (layers, "copy_to_tensor_model_parallel_region"),
    "the reduction": (layers, "reduce_from_tensor_model_parallel_region"),
}


@pytest.mark.parametrize("where", REPLACED)
def test_what_somebody_replaced_in_megatron_runs(where: str, loops: Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3)
    plain = step(stock)
    owner, name = REPLACED[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        assert name in mlp.reason_for_stock_forward()
        expected = step(stock)
        assert_same(step(mlp), expected)
        assert loops.count == 0
        with pytest.raises(AssertionError):
            assert_same(expected, plain)
    assert_same(step(mlp), plain)
    assert loops.count == 1


def test_what_somebody_replaced_in_tiled_layers_runs(loops: Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3)
    results = []
    for one, owner in ((stock, ColumnParallelLinear), (mlp, TiledColumnParallelLinear)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", doubled(owner.forward))
            results.append(step(one))
    assert_same(*results)
    assert loops.count == 0


@pytest.mark.parametrize("features", [7, 13])
def test_weights_of_another_shape_are_computed_whole(features: int, loops: Loops) -> None:
    """Features that are cut away or added after the model was tiled."""
    stock = stock_mlp(add_bias_linear=True, **SWIGLU)
    mlp = tiled(stock, 3)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator).double() for shape in ((2 * features, 6), (6, features))]
    for one in (stock, mlp):
        one.linear_fc1.weight, one.linear_fc2.weight = (torch.nn.Parameter(weight.clone()) for weight in weights)
        one.linear_fc1.bias = torch.nn.Parameter(torch.linspace(-1, 1, 2 * features).double())
    assert mlp.reason_for_stock_forward() == "linear_fc1 has a weight of another shape than its tiles"
    assert_same(step(mlp), step(stock))
    assert loops.count == 0


def test_stock_refusals_stay() -> None:
    mlp = tiled(stock_mlp(is_expert=True, **ACTIVATIONS["geglu"]), 3)
    with pytest.raises(ValueError, match="Only support fusion of swiglu"):
        step(mlp, (7,), scaled=True)


def test_reasons_to_stay_stock() -> None:
    stock = stock_mlp(**SWIGLU)
    assert convert_mlp(clone(stock)) == "linear_fc1 is not tiled"
    uneven = with_tiled_layers(stock, 3)
    uneven.linear_fc2.set_tiles(4, 1)
    assert convert_mlp(uneven) == "the grids fc1=1x3 and fc2=4x1 do not match: they must be 1xN and Nx1"
    assert convert_mlp(torch.nn.Linear(1, 1)) == "Linear is not a stock MLP"
    assert convert_mlp(tiled(stock, 3)) == "TiledMLP is not a stock MLP"
    for option, reason in {
        "use_te_activation_func": "--use-te-activation-func",
        "activation_func_fp8_input_store": "the activation's input is stored in fp8",
        "cpu_offloading": "activations are offloaded to the CPU",
    }.items():
        mlp = with_tiled_layers(stock, 3)
        mlp.config = SimpleNamespace(**{**vars(mlp.config), option: True})
        assert convert_mlp(mlp) == reason
        assert type(mlp) is MLP


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("steps", [None, 2])
def test_an_mlp_without_its_layers_stays_stock(left: int, steps: int | None) -> None:
    mlp = stock_mlp(**SWIGLU)
    for name in ("linear_fc1", "linear_fc2")[: 2 - left]:
        delattr(mlp, name)
    assert len(tile(torch.nn.ModuleList([mlp]), TilingConfig(tp_overlap=steps))) == left
    assert type(mlp) is MLP


@pytest.mark.parametrize("keep", [-1, 4])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"--tiled-mlp-keep {keep}: must be within \[0, 3\]"):
        convert_mlp(with_tiled_layers(stock_mlp(**SWIGLU), 3), keep)

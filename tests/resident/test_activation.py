"""Which activation functions tiles compute: of one feature alone, the same each time, without parameters."""

# ruff: noqa: F401, F811 - the fixtures of test_mlp are used by name

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tiling.resident.activation import activation_of, reason_in_activation
from megatron_tiling.resident.mlp import convert_mlp
from tests.tiles.test_mlp import (
    Loops,
    assert_same,
    loops,
    small_token_steps,
    step,
    stock_mlp,
    tiled,
    with_tiled_layers,
    world_of_one,
)

ALPHA = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
PARAMETERS, VALUES, PARTS = "has parameters of its own", "other values than all of them", "does not take a part"


def largest_alone(x: Tensor) -> Tensor:
    return torch.where(x >= x.topk(3, dim=-1).values[..., -1:], x, 0)


def of_eleven_features(x: Tensor) -> Tensor:
    return F.layer_norm(x, (11,))


#: Functions that tiles cannot compute, and why.
COUPLED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "parameters": (nn.PReLU(dtype=torch.float64), PARAMETERS),
    "a parameter of somebody else's": (lambda x: F.gelu(x * ALPHA), PARAMETERS),
    "random": (lambda x: F.dropout(F.gelu(x), 0.2), VALUES),
    "a random module": (nn.Sequential(nn.GELU(), nn.Dropout(0.2)), VALUES),
    "the largest features": (largest_alone, VALUES),
    "normalized features": (lambda x: F.normalize(F.gelu(x), dim=-1), VALUES),
    "all tokens": (lambda x: x - x.mean(dim=0, keepdim=True), VALUES),
    "a fixed number of features": (of_eleven_features, PARTS),
}
#: Functions that Megatron has not, and tiles can.
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "mish": nn.Mish(),
    "approximate GELU": partial(F.gelu, approximate="tanh"),
    "leaky": nn.LeakyReLU(0.1),
    "by hand": lambda x: torch.tanh(x) * x,
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", COUPLED)
def test_what_tiles_cannot_compute_stays_stock(name: str, gated: bool, loops: Loops) -> None:
    function, words = COUPLED[name]
    mlp = with_tiled_layers(stock_mlp(activation_func=function, gated_linear_unit=gated), 3)
    before = torch.get_rng_state()
    assert words in convert_mlp(mlp)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_one_feature_run_in_tiles(name: str, gated: bool, loops: Loops) -> None:
    stock = stock_mlp(activation_func=ELEMENTWISE[name], gated_linear_unit=gated)
    assert_same(step(tiled(stock, 3)), step(stock))
    assert loops.count == 1


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", COUPLED)
def test_a_function_that_is_given_later_runs_as_in_stock(name: str, gated: bool, loops: Loops) -> None:
    stock = stock_mlp(activation_func=F.silu, gated_linear_unit=gated)
    mlp = tiled(stock, 3)
    found = []
    for one in (stock, mlp):
        one.activation_func = one.config.activation_func = COUPLED[name][0]
        torch.manual_seed(3)
        ALPHA.grad = None
        found.append(step(one) | {"alpha": ALPHA.grad})
    assert_same(*reversed(found))
    assert loops.count == 0


def _with_closure(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)


@pytest.mark.parametrize("holds", ["nothing", "a closure", "a method"])
@pytest.mark.parametrize("kind", ["frozen parameters", "dropout"])
def test_a_function_that_changes_later_runs_as_in_stock(kind: str, holds: str, loops: Loops) -> None:
    """It stays the same object, and tiles computed it before."""
    stock = stock_mlp(activation_func=F.silu)
    found = []
    for mlp in (stock, tiled(stock, 3)):
        module: Any = nn.Dropout(0.0) if kind == "dropout" else nn.PReLU(dtype=torch.float64).requires_grad_(False)
        functions = {"nothing": module, "a closure": _with_closure(module), "a method": module.forward}
        mlp.activation_func = mlp.config.activation_func = functions[holds]
        step(mlp)
        module.requires_grad_(True)
        module.p = 0.5
        torch.manual_seed(3)
        found.append(step(mlp) | {"alpha": getattr(getattr(module, "weight", None), "grad", None)})
    assert_same(*reversed(found))
    assert loops.count == 1


def test_a_function_with_a_variable_that_is_not_there_yet(loops: Loops) -> None:
    def mish(x: Tensor) -> Tensor:
        return F.mish(x) if x.numel() else unused

    mlp = tiled(stock_mlp(activation_func=mish), 3)
    step(mlp)
    assert loops.count == 1
    unused = torch.empty(0)


def test_formulas_of_kernels_follow_what_stock_calls() -> None:
    """Of a gated MLP without fusion that is the config's."""
    mlp = stock_mlp(activation_func=F.silu, gated_linear_unit=True)
    mlp.config.activation_func = F.gelu
    formula = activation_of(mlp, scaled=False).formula
    assert formula is not None and formula.kind == "gelu"


def test_a_fused_function_that_somebody_replaced_has_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import mlp as module

    mlp = stock_mlp(activation_func=F.silu, gated_linear_unit=True, bias_activation_fusion=True)
    assert activation_of(mlp, scaled=False).formula is not None
    monkeypatch.setattr(module, "bias_swiglu_impl", lambda *args: module.bias_geglu_impl(*args[:2]))
    assert activation_of(mlp, scaled=False).formula is None


def test_whoever_hooks_the_function_sees_all_features(loops: Loops) -> None:
    mlp = tiled(stock_mlp(activation_func=nn.Mish()), 3)
    seen: list[tuple[int, ...]] = []
    hook = mlp.activation_func.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    assert reason_in_activation(mlp) == "the activation function has hooks"
    step(mlp)
    assert seen == [(5, 2, 11)] and loops.count == 0
    hook.remove()
    step(mlp)
    assert loops.count == 1

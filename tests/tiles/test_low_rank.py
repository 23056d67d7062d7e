"""Adapters in the tile loop of an MLP, against autograd on whole matrices, in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tiling.tiles import mlp_tiles
from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.mlp import LowRank, MLPLoop, adapted_mlp

TOKENS, HIDDEN, FEATURES, RANK = 5, 6, 11, 3
PARTS = (0, 4, 8, 11)


@pytest.fixture(autouse=True)
def small_token_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_tiles, "TOKEN_MULTIPLE", 2)


def swiglu(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    gate, up = (pre if bias is None else pre + bias).chunk(2, dim=-1)
    output = F.silu(gate) * up
    return output if scale is None else output * scale[:, None]


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "hidden": (TOKENS, HIDDEN),
        "fc1": (2 * FEATURES, HIDDEN),
        "bias": (2 * FEATURES,),
        "fc2": (HIDDEN, FEATURES),
        "scale": (TOKENS,),
        "low": (TOKENS, RANK),
        "up": (2 * FEATURES, RANK),
        "down": (RANK + 1, FEATURES),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def whole(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pre = given["hidden"] @ given["fc1"].t()
    if given["low"] is not None:
        pre = pre + given["low"] @ given["up"].t()
    activated = swiglu(pre, given["bias"], given["scale"])
    none = activated.new_zeros(())
    return activated @ given["fc2"].t(), none if given["down"] is None else activated @ given["down"].t()


def tiled(given: dict[str, Any], keep: int, fuse: bool = False) -> tuple[Tensor, Tensor]:
    loop = MLPLoop(PARTS, Activation(True, swiglu), keep, fuse_up_wgrad=fuse, fuse_down_wgrad=fuse)
    adapters = LowRank(given["low"], given["up"], given["down"])
    wide = (given[name] for name in ("hidden", "fc1", "bias", "fc2", "scale"))
    output, low = adapted_mlp(*wide, adapters, loop)
    return output, output.new_zeros(()) if low is None else low


def gradients(outputs: tuple[Tensor, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    total = sum((one * torch.randn(one.shape, generator=generator, dtype=torch.float64)).sum() for one in outputs)
    wanted = [name for name, one in given.items() if one is not None and one.requires_grad]
    return dict(zip(wanted, torch.autograd.grad(total, [given[name] for name in wanted]), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", range(len(PARTS)))
def test_adapters_of_either_layer_or_both(keep: int) -> None:
    """All operands trained, or the adapters alone."""
    for absent, frozen in itertools.product(((), ("low", "up"), ("down",)), ((), ("fc1", "bias", "fc2", "scale"))):
        given = operands() | dict.fromkeys(absent)
        for name in frozen:
            given[name].requires_grad_(False)
        for found, expected in zip(tiled(given, keep), whole(given), strict=True):
            torch.testing.assert_close(found, expected)
        found_grads, wanted = gradients(tiled(given, keep), given), gradients(whole(given), given)
        assert found_grads.keys() == wanted.keys()
        for name, expected in wanted.items():
            torch.testing.assert_close(found_grads[name], expected, msg=f"{name} {absent} {frozen}")


@pytest.mark.parametrize("trained", ["hidden", "low", "up", "down"])
def test_one_of_them_alone(trained: str) -> None:
    given = operands()
    for name, one in given.items():
        one.requires_grad_(name == trained)
    for keep in range(len(PARTS)):
        found, wanted = gradients(tiled(given, keep), given), gradients(whole(given), given)
        torch.testing.assert_close(found[trained], wanted[trained])


def test_their_gradients_go_into_main_grad() -> None:
    given = operands()
    wanted = gradients(whole(given), given)
    for name in ("up", "down"):
        given[name].main_grad = torch.ones_like(given[name])
    outputs = tiled(given, keep=1, fuse=True)
    generator = torch.Generator().manual_seed(2)
    sum((one * torch.randn(one.shape, generator=generator, dtype=torch.float64)).sum() for one in outputs).backward()  # type: ignore[union-attr]
    for name in ("up", "down"):
        assert given[name].grad is None
        torch.testing.assert_close(given[name].main_grad, 1 + wanted[name])


def test_float32_sums() -> None:
    """In bfloat16 the input gradients of fc1 and of its adapter are summed over tiles in float32."""
    given = operands(torch.bfloat16)
    loop = MLPLoop(PARTS, Activation(True, swiglu), 0, fp32_accumulate=True)
    wide = (given[name] for name in ("hidden", "fc1", "bias", "fc2", "scale"))
    output, low = adapted_mlp(*wide, LowRank(given["low"], given["up"], given["down"]), loop)
    assert low is not None
    (output.sum() + low.sum()).backward()
    assert given["low"].grad.dtype == given["hidden"].grad.dtype == torch.bfloat16

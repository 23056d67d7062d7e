"""What stands between fc1 and fc2 in a Megatron MLP, and whether tiles can compute it.

Tiles compute an activation for some features or tokens at a time, and again in the backward pass. So it must be a
function of one feature alone (two, of a gated linear unit), the same each time, without parameters of its own.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu as unfused_quick_gelu
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import mlp as mlp_module
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_tiling.resident.stock_code import is_own_function
from megatron_tiling.tiles.activation import Activation, Formula

#: Activation functions that the kernels know, outside Megatron's fused ones.
FORMULA_KINDS: dict[Callable[..., Tensor], Any] = {
    F.silu: "silu",
    F.gelu: "gelu",
    F.relu: "relu",
    quick_gelu: "quick_gelu",
    unfused_quick_gelu: "quick_gelu",
    squared_relu: "squared_relu",
}
#: Names, in Megatron's modules, of the fused activations that the kernels know.
_FUSED = (
    *("bias_gelu_impl", "bias_geglu_impl", "bias_swiglu_impl", "weighted_bias_swiglu_impl"),
    *("weighted_bias_quick_geglu_impl", "weighted_squared_relu_impl"),
)
PROBE = 16, 64  # tokens, features
_EMPTY = CellType()


def activation_of(mlp: MLP, scaled: bool) -> Activation:
    """What stands between fc1 and fc2 in stock's ``MLP.forward``: that very code, and the formula for GPU kernels."""

    def stock(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        output: Tensor = MLP.forward(_BetweenLayers(mlp, bias), pre, scale)[0]
        return output

    return Activation(mlp.config.gated_linear_unit, stock, _formula(mlp, scaled))


def _formula(mlp: MLP, scaled: bool) -> Formula | None:
    config, function, gated = mlp.config, activation_function(mlp), mlp.config.gated_linear_unit
    if config.bias_activation_fusion:
        if not has_own_fused(mlp_module):
            return None
        clamped = config.activation_func_clamp_value is not None  # by stock's fused SwiGLU from 0.20 on alone
        if function == F.silu and gated and not clamped and not (scaled and config.add_bias_linear):
            return Formula("silu")
        if function == F.gelu and not scaled and (gated or config.add_bias_linear):
            return Formula("gelu_tanh")
        return None  # stock's code says what it does, if anything
    kind = FORMULA_KINDS.get(function)
    if kind is None:
        return None
    return Formula(kind, config.activation_func_clamp_value, config.glu_linear_offset) if gated else Formula(kind)


def has_own_fused(module: ModuleType) -> bool:
    """Whether the fused activations in a module of Megatron's are its own. Versions have some, or others."""
    return all(is_own_function(getattr(module, name)) for name in _FUSED if hasattr(module, name))


class _BetweenLayers:
    """Stands for an MLP whose linear layers pass on what they are given."""

    def __init__(self, mlp: MLP, fc1_bias: Tensor | None) -> None:
        self.config, self.activation_func = mlp.config, mlp.activation_func
        self.linear_fc1, self.linear_fc2 = PassOn(fc1_bias), PassOn()


class PassOn(torch.nn.Module):
    """Stands for a layer: returns its input, and a bias."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self._output_bias = (bias,)  # in a tuple: not a parameter

    def forward(self, input_: Tensor, *of_experts: Any) -> tuple[Tensor, Tensor | None]:
        return input_, self._output_bias[0]


def activation_function(mlp: Any) -> Callable[..., Tensor]:
    """The one that stock's ``MLP.forward`` calls."""
    reads_config = mlp.config.gated_linear_unit and not mlp.config.bias_activation_fusion
    function: Callable[..., Tensor] = mlp.config.activation_func if reads_config else mlp.activation_func
    return function


def reason_in_activation(mlp: Any) -> str:
    """Why tiles cannot compute an MLP's activation function, or nothing."""
    function = activation_function(mlp)
    if isinstance(function, torch.nn.Module) and any(map(_has_hooks, function.modules())):
        return "the activation function has hooks"
    if function in FORMULA_KINDS or mlp.config.bias_activation_fusion:  # stock refuses others with fusion
        return ""
    parameter = next(mlp.linear_fc1.parameters(), None)
    device, dtype = torch.device("cpu"), torch.float32
    if parameter is not None and parameter.is_floating_point() and not parameter.is_meta:
        device, dtype = parameter.device, parameter.dtype
    reason = _reason_in_values(function, device, dtype, _state_of(function))
    return reason and f"the activation function {reason}"


def _state_of(function: Any) -> tuple[Any, ...]:
    """What may change in a function that stays the same object: which parameters train, a module's mode and numbers."""
    state: list[Any] = []
    left, seen = [function], set()
    while left:
        held = left.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, torch.nn.Module):
            own = ((name, value) for name, value in vars(held).items() if isinstance(value, bool | int | float | str))
            state.append((id(held), *own))
            left += (*held.children(), *held.parameters(recurse=False), *held.buffers(recurse=False))
        elif isinstance(held, Tensor):
            state.append((id(held), held.requires_grad))
        elif isinstance(held, partial):
            left += (held.func, *held.args, *held.keywords.values())
        elif isinstance(held, MethodType):
            left += (held.__self__, held.__func__)
        elif isinstance(held, FunctionType) and not (held.__module__ or "").startswith("torch."):
            named = (held.__globals__.get(name) for name in held.__code__.co_names)
            filled = (cell for cell in held.__closure__ or () if cell != _EMPTY)
            left += (*(cell.cell_contents for cell in filled), *named)
        elif isinstance(held, bool | int | float | str):
            state.append(held)
    return tuple(state)


@lru_cache(maxsize=64)
def _reason_in_values(
    function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, state: tuple[Any, ...]
) -> str:
    """What a function does with some numbers that it would not do with a part of them; ``state`` is of the cache."""
    tokens, features = PROBE
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False):
        x = torch.linspace(-3, 3, tokens * features, device=device).view(features, tokens).t().to(dtype).contiguous()
        try:
            with torch.enable_grad():
                whole = function(x)
            if whole.requires_grad:
                return "has parameters of its own"
            quarters = [[function(part.contiguous()) for part in rows.chunk(2, dim=1)] for rows in x.chunk(2)]
            again = torch.cat([torch.cat(row, dim=1) for row in quarters])
            close = 8 * torch.finfo(dtype).eps
            same = torch.allclose(whole, again, rtol=close, atol=close, equal_nan=True)
        except Exception as error:  # code of the user's
            return f"does not take a part of the features: {type(error).__name__}: {error}"
    return "" if same else "gives a part of the features, or of the tokens, other values than all of them"


def _has_hooks(module: torch.nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)

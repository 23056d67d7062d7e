"""Adapters around linear layers: Megatron-Bridge's keep the layer as ``to_wrap``, peft's as ``base_layer``.

The tile loop of an MLP computes LoRA of Megatron-Bridge along: its wide factors tile by tile, in place of the product
of ``linear_out`` beside fc1 and of ``linear_in`` beside fc2. All else that an adapter does, its other factor, its
collectives and its scaling, is its own ``forward``, with a module in that place that passes on what it is given.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_tiling.resident.layers import reduced

WRAPPED = ("to_wrap", "base_layer")
#: Classes of Megatron-Bridge 0.6.2 that the loop knows, by name: nothing of it is imported.
WRAPPER, ADAPTER = "megatron.bridge.peft.lora_layers.LoRALinear", "megatron.bridge.peft.utils.ParallelLinearAdapter"


def unwrapped(module: Any) -> Any:
    """The layer itself, whatever adapters are around it."""
    while isinstance(module, torch.nn.Module):
        inner = next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)
        if inner is None:
            break
        module = inner
    return module


def name_without_adapters(name: str) -> str:
    """``"mlp.linear_fc1.to_wrap"`` -> ``"mlp.linear_fc1"``, as the layer is called where it has no adapter."""
    while name.rpartition(".")[2] in WRAPPED:
        name = name.rpartition(".")[0]
    return name


def reason_outside_loop(wrapper: Any, reason_in_hooks: Callable[[torch.nn.Module], str]) -> str:
    """Why the tile loop cannot compute this adapter around fc1 or fc2 now, or nothing.

    Args:
        wrapper: around a column or row layer of an MLP.
        reason_in_hooks: why hooks of a module must run with it, or nothing.
    """
    adapter: Any = getattr(wrapper, "adapter", None)
    if not _is(wrapper, WRAPPER) or not _is(adapter, ADAPTER):
        return f"{type(wrapper).__name__} with {type(adapter).__name__} is not LoRA of Megatron-Bridge"
    layer, narrow, wide = wrapper.to_wrap, adapter.linear_in, adapter.linear_out
    if adapter.input_is_parallel:
        narrow, wide = wide, narrow
    expected = RowParallelLinear if adapter.input_is_parallel else ColumnParallelLinear
    reasons = {
        "it is around another adapter": unwrapped(layer) is not layer,
        "it is switched off": not wrapper._adapter_enabled,
        "it has dropout": type(adapter.dropout) is not torch.nn.Identity,
        "it has an activation": type(adapter.activation) is not torch.nn.Identity,
        "it is one of an expert's": adapter.is_expert,
        "a2a_experimental": adapter.use_a2a,
        "sequence_parallel_input_regather": adapter.sequence_parallel_input_regather,
        "activations are offloaded to the CPU": adapter.config.cpu_offloading,
        "its layers are others than Megatron's": type(wide) is not expected or type(narrow) is not ColumnParallelLinear,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), ""):
        return reason
    others = {
        "its layers communicate otherwise": wide.explicit_expert_comm
        or wide.sequence_parallel
        or getattr(wide, "gather_output", False)
        or not getattr(wide, "input_is_parallel", True),
        "its layers have biases": wide.bias is not None or narrow.bias is not None,
        "its dtype is another": wide.weight.dtype != layer.weight.dtype or narrow.weight.dtype != layer.weight.dtype,
    }
    if reason := next((reason for reason, applies in others.items() if applies), ""):
        return reason
    modules = (wrapper, adapter, wide, adapter.dropout, adapter.activation)
    return next(filter(None, map(reason_in_hooks, modules)), "")


def _is(module: Any, path: str) -> bool:
    """Whether a module is of a class, by its path, and computes by that class's own ``forward``."""
    kind = type(module)
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    own = code is not None and code.co_qualname == f"{kind.__qualname__}.forward"
    return f"{kind.__module__}.{kind.__qualname__}" == path and own and "forward" not in vars(module)


def narrow_input(wrapper: Any, hidden: Tensor) -> Tensor:
    """``[..., h]`` -> ``[..., r]``: of an adapter around fc1 all but its ``linear_out``, with its scale."""
    adapter = wrapper.adapter
    group = adapter.linear_out.tp_group
    result: Tensor = _with(adapter, "linear_out", lambda low: copy_to_tensor_model_parallel_region(low, group=group))(
        hidden.contiguous()
    )
    return result


def widened(wrapper: Any, low: Tensor) -> Tensor:
    """``[..., r]``, of this rank's features -> ``[..., h]``: of an adapter around fc2 all but its ``linear_in``."""
    adapter = wrapper.adapter
    result: Tensor = _with(adapter, "linear_in", lambda part: reduced(adapter.linear_in, part))(low)
    return result


def _with(adapter: Any, name: str, function: Callable[[Tensor], Tensor]) -> Any:
    """The adapter's ``forward``, as if one of its two layers were a function."""
    other = copy.copy(adapter)
    other._modules = {**adapter._modules, name: _Instead(function)}
    return other.forward


class _Instead(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return self.function(input_), None

"""Adapters around linear layers: Megatron-Bridge's keep the layer as ``to_wrap``, peft's as ``base_layer``.

The tile loop of an MLP computes LoRA of Megatron-Bridge and of mcore-bridge along: its wide factors tile by tile, in
place of the product of B beside fc1 and of A beside fc2. The other factor is the adapter's own module; ``low`` and
``widened`` are all that it does but for that product, its collectives and scaling included.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_tiling.resident.comm import reduced, summed

WRAPPED = ("to_wrap", "base_layer")
ReasonInHooks = Callable[[torch.nn.Module], str]


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


class LoopedAdapter:
    """An adapter around fc1 or fc2 whose wide factor the tile loop multiplies with. Made anew at each call.

    Attributes:
        path: of the class around the layer: nothing of these packages is imported.
        wide: the module of the wide factor, whose ``forward`` is not called.
        takes_norm: whether it takes the output of fc1's norm, and not its input.
    """

    path: str
    wide: Any
    takes_norm: bool

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.layer = wrapper, unwrapped(wrapper)

    def reasons(self) -> Iterator[tuple[str, Any]]:
        """What the loop cannot compute, and whether it applies; later ones ask only if no earlier one does."""
        raise NotImplementedError

    def others(self) -> tuple[torch.nn.Module, ...]:
        """Modules that are not called either, and must have no hooks."""
        return ()

    @property
    def fuses_wgrad(self) -> bool:
        raise NotImplementedError

    def low(self, hidden: Tensor) -> Tensor:
        """Around fc1: ``[..., h]`` -> ``[..., r]`` of all tokens, which B multiplies with."""
        raise NotImplementedError

    def widened(self, low: Tensor) -> Tensor:
        """Around fc2: ``[..., r]``, of this rank's features -> what is added to fc2's output."""
        raise NotImplementedError


class BridgeLoRA(LoopedAdapter):
    """``LoRALinear`` of Megatron-Bridge (0.6.2) with a ``ParallelLinearAdapter``, whose own ``forward`` is run."""

    path = "megatron.bridge.peft.lora_layers.LoRALinear"

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self.adapter = wrapper.adapter
        self.takes_norm = getattr(self.layer, "return_layernorm_output", False)
        if _is(self.adapter, "megatron.bridge.peft.utils.ParallelLinearAdapter"):
            layers = self.adapter.linear_out, self.adapter.linear_in
            self.narrow, self.wide = layers[::-1] if not self.adapter.input_is_parallel else layers

    def reasons(self) -> Iterator[tuple[str, Any]]:
        adapter = self.adapter
        yield f"{type(adapter).__name__} is not Megatron-Bridge's LoRA", not hasattr(self, "wide")
        yield "it is around another adapter", self.wrapper.to_wrap is not self.layer
        yield "it is switched off", not self.wrapper._adapter_enabled
        yield "it has dropout", type(adapter.dropout) is not torch.nn.Identity
        yield "it has an activation", type(adapter.activation) is not torch.nn.Identity
        yield "it is one of an expert's", adapter.is_expert
        yield "a2a_experimental", adapter.use_a2a
        yield "sequence_parallel_input_regather", adapter.sequence_parallel_input_regather
        yield "activations are offloaded to the CPU", adapter.config.cpu_offloading
        kinds = ColumnParallelLinear, RowParallelLinear if adapter.input_is_parallel else ColumnParallelLinear
        yield "its layers are others than Megatron's", (type(self.narrow), type(self.wide)) != kinds
        yield "its layers communicate otherwise", self.wide.explicit_expert_comm or self.wide.sequence_parallel
        yield (
            "its layers gather or split",
            getattr(self.wide, "gather_output", False) or not getattr(self.wide, "input_is_parallel", True),
        )
        yield "its layers have biases", self.wide.bias is not None or self.narrow.bias is not None
        dtypes = {self.wide.weight.dtype, self.narrow.weight.dtype, self.layer.weight.dtype}
        yield "its dtype is another", len(dtypes) > 1

    def others(self) -> tuple[torch.nn.Module, ...]:
        return self.adapter, self.adapter.dropout, self.adapter.activation

    @property
    def fuses_wgrad(self) -> bool:
        return bool(self.wide.gradient_accumulation_fusion)

    def low(self, hidden: Tensor) -> Tensor:
        share = partial(copy_to_tensor_model_parallel_region, group=self.wide.tp_group)
        return self._forward(hidden.contiguous(), "linear_out", share)

    def widened(self, low: Tensor) -> Tensor:
        return self._forward(low, "linear_in", partial(reduced, self.wide))

    def _forward(self, input_: Tensor, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapter's ``forward``, as if one of its two layers were a function."""
        other = copy.copy(self.adapter)
        other._modules = {**self.adapter._modules, name: _Instead(function)}
        output: Tensor = other.forward(input_)
        return output


class McoreBridgeLoRA(LoopedAdapter):
    """``LoraParallelLinear`` of mcore-bridge (1.6.5), a peft layer: one of its factors is whole on each rank."""

    path = "mcore_bridge.tuners.lora.LoraParallelLinear"

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self.takes_norm = isinstance(self.layer, te.TELayerNormColumnParallelLinear)
        self.active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if len(self.active) == 1:
            self.factors = wrapper.lora_A[self.active[0]], wrapper.lora_B[self.active[0]]
            self.wide = self.factors[0 if wrapper.is_parallel_a else 1]

    def reasons(self) -> Iterator[tuple[str, Any]]:
        wrapper, layer = self.wrapper, self.layer
        yield f"{len(self.active)} adapters are active", len(self.active) != 1
        yield "it is around another adapter", wrapper.base_layer is not layer
        yield "it is switched off", wrapper.disable_adapters or wrapper.merged
        yield "it has dropout", type(wrapper.lora_dropout[self.active[0]]) is not torch.nn.Identity
        yield "it is one of an expert's", wrapper.is_expert
        row = te.TERowParallelLinear, te.TELinear
        kinds = row if wrapper.is_parallel_a else (te.TELinear, te.TEColumnParallelLinear)
        yield "its layers are others than TransformerEngine's", tuple(map(type, self.factors)) != kinds
        yield "its layers have biases", any(factor.use_bias for factor in self.factors)
        yield (
            "its layers communicate otherwise",
            self.wide.parallel_mode != ("row" if wrapper.is_parallel_a else "column"),
        )
        dtypes = {layer.weight.dtype, *(factor.weight.dtype for factor in self.factors)}
        yield "its dtype is another", len(dtypes) > 1

    @property
    def fuses_wgrad(self) -> bool:
        return bool(self.wide.fuse_wgrad_accumulation)

    @property
    def scaling(self) -> float:
        factor: float = self.wrapper.scaling[self.active[0]]
        return factor

    def low(self, hidden: Tensor) -> Tensor:
        low: Tensor = self.factors[0](hidden)[0] * self.scaling
        share = (
            gather_from_sequence_parallel_region
            if self.wide.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        shared: Tensor = share(low, group=self.wide.tp_group)
        return shared

    def widened(self, low: Tensor) -> Tensor:
        output: Tensor = self.factors[1](summed(self.wide, low))[0] * self.scaling
        return output


KINDS = (BridgeLoRA, McoreBridgeLoRA)


def looped_adapter(wrapper: Any) -> LoopedAdapter | None:
    """What the loop can compute of an adapter, if it knows its class."""
    return next((kind(wrapper) for kind in KINDS if _is(wrapper, kind.path)), None)


def reason_outside_loop(wrapper: Any, reason_in_hooks: ReasonInHooks) -> str:
    """Why the tile loop cannot compute this adapter around fc1 or fc2 now, or nothing.

    Args:
        wrapper: around a column or row layer of an MLP.
        reason_in_hooks: why hooks of a module must run with it, or nothing.
    """
    adapter = looped_adapter(wrapper)
    if adapter is None:
        return f"{type(wrapper).__name__} is no LoRA that the loop knows"
    if reason := next((reason for reason, applies in adapter.reasons() if applies), ""):
        return reason
    return next(filter(None, map(reason_in_hooks, (wrapper, adapter.wide, *adapter.others()))), "")


def _is(module: Any, path: str) -> bool:
    """Whether a module is of a class, by its path, and computes by that class's own ``forward``."""
    kind = type(module)
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    own = code is not None and code.co_qualname == f"{kind.__qualname__}.forward"
    return f"{kind.__module__}.{kind.__qualname__}" == path and own and "forward" not in vars(module)


class _Instead(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return self.function(input_), None

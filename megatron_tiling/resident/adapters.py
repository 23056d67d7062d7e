"""Adapters around linear layers: Megatron-Bridge's keep the layer as ``to_wrap``, peft's as ``base_layer``."""

from typing import Any

import torch

WRAPPED = ("to_wrap", "base_layer")


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

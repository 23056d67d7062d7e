"""LoRA on Megatron's parallel linear layers, dense or tiled: a frozen layer and a trainable low-rank path beside it.

    tile(model, config)
    add_lora(model, ["linear_qkv", "linear_proj"], rank=16, alpha=32)

The path is cut as the layer is: ``B`` by output features in a column layer, ``A`` by input features in a row layer.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class LoRALinear(torch.nn.Module):
    """``base(x) + alpha / rank * B(A(x))``; ``B`` begins as zeros.

    Args:
        base: a column or row layer. It is frozen.
        rank, alpha: as in LoRA.

    Raises:
        ValueError: the layer is another one, or under sequence parallelism.
    """

    def __init__(self, base: Any, rank: int, alpha: float) -> None:
        super().__init__()
        if not isinstance(base, (ColumnParallelLinear, RowParallelLinear)):
            raise ValueError(f"LoRALinear: {type(base).__name__} is not a column or row layer of Megatron")
        config = copy.copy(base.config)
        if config.sequence_parallel:
            raise ValueError("LoRALinear: whole parameters see all tokens here; leave out --sequence-parallel")
        config.gradient_accumulation_fusion = False
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        options: dict[str, Any] = {"config": config, "bias": False, "init_method": torch.nn.init.xavier_normal_}
        whole = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.a: torch.nn.Module
        self.b: torch.nn.Module
        if isinstance(base, ColumnParallelLinear):
            self.a = torch.nn.Linear(base.input_size, rank, **whole)
            self.b = ColumnParallelLinear(rank, base.output_size, gather_output=base.gather_output, **options)
        else:
            parallel = {"input_is_parallel": base.input_is_parallel, "skip_bias_add": True}
            self.a = RowParallelLinear(base.input_size, rank, **parallel, **options)
            self.b = torch.nn.Linear(rank, base.output_size, **whole)
        torch.nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` -> the base layer's output and bias, as of the base layer."""
        output, bias = self.base(x, *args, **kwargs)
        return output + self.scale * _first(self.b(_first(self.a(x)))), bias

    @torch.no_grad()
    def merged(self) -> Any:
        """The base layer, with the path added to its weight."""
        self.base.weight += self.scale * (self.b.weight @ self.a.weight)
        return self.base


def add_lora(model: torch.nn.Module, names: Sequence[str], rank: int, alpha: float) -> None:
    """Freeze a built model, and wrap its layers of these names, in place; before Megatron's DDP wraps the model."""
    model.requires_grad_(False)
    _replace(model, names, lambda layer: LoRALinear(layer, rank, alpha))


def merge_lora(model: torch.nn.Module) -> None:
    """The reverse, in place: the layers are again what they were, the paths added to their weights."""
    _replace(model, None, LoRALinear.merged)


def _replace(model: torch.nn.Module, names: Sequence[str] | None, new: Any) -> None:
    for name, layer in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in names if names is not None else isinstance(layer, LoRALinear):
            setattr(model.get_submodule(parent), child, new(layer))


def _first(result: Any) -> Tensor:
    """Megatron's layers return a bias, too."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output

"""What is only asked about, by name, and refused where it is used."""

from contextlib import nullcontext
from typing import Any

import torch


class NoFigures(NotImplementedError):
    """The planner cannot count something that the script uses; the message is all that its user needs."""


def refusal(what: str, instead: str = "") -> NoFigures:
    """What to raise, and what to do instead, if anything."""
    return NoFigures(f"megatron_tiling plan: no figures of {what} yet{instead and '; '}{instead}")


class _Recipe:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise refusal(f"the recipe {type(self).__name__}", "take another --fp8-recipe, or leave out --fp4-format")


RECIPES: dict[str, Any] = {name: type(name, (_Recipe,), {}) for name in ("MXFP8BlockScaling", "NVFP4BlockScaling")}


class Fp8Padding(torch.nn.Module):
    """Made with every grouped MLP, called in FP8 alone."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()


class Fp8Unpadding(Fp8Padding):
    """As ``Fp8Padding``."""


class LayerNormMLP:
    """Only asked about, by adapters."""


class QuantizedTensor:
    """No tensor is one."""


class FusibleOperation:
    """In annotations alone."""


class CudaRNGStatesTracker:
    """Megatron's own is what the planner uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise refusal("--te-rng-tracker", "leave it out: it changes no memory")


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Tells layers of delayed scaling, which then keep a few numbers more."""
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    """Where it is asked for, a few numbers more would be kept."""
    return False

"""What is only asked about, by name, and refused where it is used."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch


def refusal(what: str, instead: str) -> NotImplementedError:
    """What to raise."""
    return NotImplementedError(f"megatron_tiling plan: no figures of {what} yet; {instead}")


class _Recipe:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise refusal(f"FP8 and FP4 ({type(self).__name__})", "leave out --fp8-format and --fp4-format")


def _named(*names: str) -> dict[str, type]:
    return {name: type(name, (_Recipe,), {}) for name in names}


_BLOCKS = "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"
RECIPES: dict[str, Any] = _named("DelayedScaling", "Float8CurrentScaling", *_BLOCKS) | {
    "Format": type("Format", (), {"E4M3": "e4m3", "HYBRID": "hybrid"})
}


class FP8GlobalStateManager:
    """FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """It is not."""
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = False, **options: Any) -> Iterator[None]:
    """Nothing, where FP8 is off."""
    if enabled:
        raise refusal("FP8", "leave out --fp8-format")
    yield


def fp8_model_init(enabled: bool = False, **options: Any) -> Any:
    """As ``fp8_autocast``."""
    return fp8_autocast(enabled)


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


class Sequential:
    """Of the op fuser."""

    def __init__(self, *args: Any) -> None:
        raise refusal("TransformerEngine's op fuser", "leave out --use-transformer-engine-op-fuser")


class CudaRNGStatesTracker:
    """Megatron's own is what the planner uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise refusal("--te-rng-tracker", "leave it out: it changes no memory")


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Tells FP8 layers."""
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    """FP8 is off."""
    return False


def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Of FP8 layers alone; others have Megatron's."""
    raise refusal("TransformerEngine's checkpoint", "leave out --fp8-format")

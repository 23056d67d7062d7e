"""Tiled Megatron models on DeepSpeed ZeRO-3, with tensor parallelism: each tile is a parameter that the engine owns."""

from typing import TYPE_CHECKING, Any

from megatron_tiling.zero3.config import Config as Config

if TYPE_CHECKING:
    from megatron_tiling.zero3.checkpoint import load_dense as load_dense
    from megatron_tiling.zero3.checkpoint import save_dense as save_dense
    from megatron_tiling.zero3.engine import build as build
    from megatron_tiling.zero3.engine import import_deepspeed as import_deepspeed
    from megatron_tiling.zero3.engine import initialize as initialize
    from megatron_tiling.zero3.engine import parameter_groups as parameter_groups
    from megatron_tiling.zero3.engine import reduce_shared_gradients as reduce_shared_gradients
    from megatron_tiling.zero3.engine import tile_sizes as tile_sizes
    from megatron_tiling.zero3.resume import load_checkpoint as load_checkpoint

#: Where the names are that need torch and Megatron: loaded when they are first asked for. ``config`` needs neither.
_LAZY = {
    "build": "engine",
    "import_deepspeed": "engine",
    "initialize": "engine",
    "load_checkpoint": "resume",
    "load_dense": "checkpoint",
    "parameter_groups": "engine",
    "reduce_shared_gradients": "engine",
    "save_dense": "checkpoint",
    "tile_sizes": "engine",
}
__all__ = ["Config", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatron_tiling.zero3' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"megatron_tiling.zero3.{_LAZY[name]}"), name)

"""Tiled Megatron models on DeepSpeed ZeRO-3, with tensor parallelism: each tile is a parameter that the engine owns."""

from typing import TYPE_CHECKING, Any

from megatron_tiling.zero3.config import Config as Config

if TYPE_CHECKING:
    from megatron_tiling.zero3.checkpoint_check import load_checkpoint as load_checkpoint
    from megatron_tiling.zero3.dense_checkpoint import load_dense as load_dense
    from megatron_tiling.zero3.dense_checkpoint import save_dense as save_dense
    from megatron_tiling.zero3.engine import build as build
    from megatron_tiling.zero3.engine import initialize as initialize

#: Where the names are that need torch and Megatron: loaded when they are first asked for. ``config`` needs neither.
_LAZY = {
    "build": "engine",
    "initialize": "engine",
    "load_checkpoint": "checkpoint_check",
    "load_dense": "dense_checkpoint",
    "save_dense": "dense_checkpoint",
}
__all__ = ["Config", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatron_tiling.zero3' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"megatron_tiling.zero3.{_LAZY[name]}"), name)

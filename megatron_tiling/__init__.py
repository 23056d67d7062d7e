"""Tiled linear layers for Megatron-LM. Importing this package changes nothing; ``install()`` does."""

from typing import TYPE_CHECKING, Any

from megatron_tiling.config import TilingConfig
from megatron_tiling.grid import TileGrid

if TYPE_CHECKING:
    from megatron_tiling.convert import tile as tile
    from megatron_tiling.layers import TiledColumnParallelLinear as TiledColumnParallelLinear
    from megatron_tiling.layers import TiledRowParallelLinear as TiledRowParallelLinear
    from megatron_tiling.provider import install as install
    from megatron_tiling.provider import tiled_model_provider as tiled_model_provider
    from megatron_tiling.provider import tiling_hook as tiling_hook
    from megatron_tiling.tiling import TiledLinear as TiledLinear
    from megatron_tiling.tiling import TiledLinearReturnBias as TiledLinearReturnBias
    from megatron_tiling.tiling import split_tensor_along_last_dim as split_tensor_along_last_dim

__all__ = [
    "TileGrid",
    "TiledColumnParallelLinear",
    "TiledLinear",
    "TiledLinearReturnBias",
    "TiledRowParallelLinear",
    "TilingConfig",
    "install",
    "split_tensor_along_last_dim",
    "tile",
    "tiled_model_provider",
    "tiling_hook",
]

#: Names that need torch or Megatron, whose import takes seconds: loaded when they are first asked for.
_LAZY = {
    "TiledColumnParallelLinear": "layers",
    "TiledLinear": "tiling",
    "TiledLinearReturnBias": "tiling",
    "TiledRowParallelLinear": "layers",
    "install": "provider",
    "split_tensor_along_last_dim": "tiling",
    "tile": "convert",
    "tiled_model_provider": "provider",
    "tiling_hook": "provider",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatron_tiling' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"megatron_tiling.{_LAZY[name]}"), name)

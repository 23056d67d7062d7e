"""Tiled linear layers for Megatron-LM. Importing this package changes nothing; ``install()`` does."""

from typing import TYPE_CHECKING, Any

from megatron_tiling.config import TilingConfig
from megatron_tiling.tiles.grid import TileGrid

if TYPE_CHECKING:
    from megatron_tiling.convert import tile as tile
    from megatron_tiling.resident.layers import TiledColumnParallelLinear as TiledColumnParallelLinear
    from megatron_tiling.resident.layers import TiledRowParallelLinear as TiledRowParallelLinear
    from megatron_tiling.resident.score_processor import score_processor as score_processor
    from megatron_tiling.tiles.scores import Scores as Scores
    from megatron_tiling.tiles.scores import tiled_kl as tiled_kl
    from megatron_tiling.tiles.scores import tiled_scores as tiled_scores
    from megatron_tiling.tiles.tiled_linear import TiledLinear as TiledLinear
    from megatron_tiling.tiles.tiled_linear import TiledLinearReturnBias as TiledLinearReturnBias
    from megatron_tiling.tiles.tiled_linear import split_tensor_along_last_dim as split_tensor_along_last_dim
    from megatron_tiling.trainer.hook import tiled_model_provider as tiled_model_provider
    from megatron_tiling.trainer.hook import tiling_hook as tiling_hook
    from megatron_tiling.trainer.install import install as install

#: Where the names are that need torch or Megatron, whose import takes seconds: loaded when they are first asked for.
_LAZY = {
    "Scores": "tiles.scores",
    "TiledColumnParallelLinear": "resident.layers",
    "TiledLinear": "tiles.tiled_linear",
    "TiledLinearReturnBias": "tiles.tiled_linear",
    "TiledRowParallelLinear": "resident.layers",
    "install": "trainer.install",
    "score_processor": "resident.score_processor",
    "split_tensor_along_last_dim": "tiles.tiled_linear",
    "tile": "convert",
    "tiled_kl": "tiles.scores",
    "tiled_model_provider": "trainer.hook",
    "tiled_scores": "tiles.scores",
    "tiling_hook": "trainer.hook",
}
__all__ = ["TileGrid", "TilingConfig", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatron_tiling' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"megatron_tiling.{_LAZY[name]}"), name)

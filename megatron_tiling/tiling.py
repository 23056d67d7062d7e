"""DeepSpeed's ``TiledLinear`` by the path that it has there; the code is in ``tiles/``."""

from megatron_tiling.tiles.tiled_linear import TiledLinear as TiledLinear
from megatron_tiling.tiles.tiled_linear import TiledLinearReturnBias as TiledLinearReturnBias
from megatron_tiling.tiles.tiled_linear import split_tensor_along_last_dim as split_tensor_along_last_dim

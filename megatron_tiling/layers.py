"""Kept for old imports; the code is in ``resident/layers.py``."""

from megatron_tiling.resident.layers import TiledColumnParallelLinear as TiledColumnParallelLinear
from megatron_tiling.resident.layers import TiledRowParallelLinear as TiledRowParallelLinear

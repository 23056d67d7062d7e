"""Kept for old imports; the code is in ``resident/mlp.py``."""

from megatron_tiling.resident.mlp import TiledMLP as TiledMLP
from megatron_tiling.resident.mlp import convert_mlp as convert_mlp

"""Kept for old imports; the code is in ``resident/lm_head.py``."""

from megatron_tiling.resident.lm_head import TiledOutputLayer as TiledOutputLayer
from megatron_tiling.resident.lm_head import convert_head as convert_head

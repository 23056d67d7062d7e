"""Tiled Megatron models on DeepSpeed ZeRO-3, with tensor parallelism: each tile is a parameter that the engine owns."""

from megatron_tiling.zero3.config import Config as Config
from megatron_tiling.zero3.engine import build as build
from megatron_tiling.zero3.engine import import_deepspeed as import_deepspeed
from megatron_tiling.zero3.engine import initialize as initialize
from megatron_tiling.zero3.engine import parameter_groups as parameter_groups
from megatron_tiling.zero3.engine import reduce_shared_gradients as reduce_shared_gradients
from megatron_tiling.zero3.engine import tile_sizes as tile_sizes
from megatron_tiling.zero3.resume import load_checkpoint as load_checkpoint

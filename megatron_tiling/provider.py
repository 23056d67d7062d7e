"""Kept for old imports; the code is in ``trainer/``."""

from megatron_tiling.trainer.hook import tiled_model_provider as tiled_model_provider
from megatron_tiling.trainer.hook import tiling_hook as tiling_hook
from megatron_tiling.trainer.install import install as install

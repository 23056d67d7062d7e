"""Stands for TransformerEngine 2.6 where its arithmetic is wanted: the real one computes nothing without a GPU.

What is constructed, saved and loaded, test_transformer_engine_cpu shows on the real one; what it computes,
test_transformer_engine_gpu. These show losses, gradients and collectives on a CPU.

Plain torch in place of its kernels, and Megatron's collectives in place of its own. Only what Megatron's layer specs
and megatron_tiling ask for. In a folder of its own, so that a test has it by a PYTHONPATH.
"""

import torch

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"

if not torch.cuda.is_available():  # Megatron's trainer asks before it builds experts in grouped GEMMs
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

"""Stands for TransformerEngine 2.6 where it cannot be installed: its constructors, parameters and state dict keys.

Plain torch in place of its kernels, and Megatron's collectives in place of its own. Only what Megatron's layer specs
and megatron_tiling ask for. In a folder of its own, so that a test has it by a PYTHONPATH.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"

"""Megatron's two FSDP wrappers take each tile of a partitioned layer for a unit.

They wrap a model layer by layer, and so a whole layer is gathered at a time. With this, what is gathered is the tile
in use, the one after it, and the untiled rest (norms, biases, embeddings, layers left dense) as far as Megatron
gathers it.
"""

from functools import partialmethod
from typing import Any

from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter

from megatron_tiling.partitioned import megatron_fsdp, torch_fsdp2


def shard_by_tiles() -> None:
    """Have both of Megatron's wrappers shard partitioned layers tile by tile, from now on. Idempotent."""
    adapter: Any = mcore_fsdp_adapter
    # Megatron's main branch (0.20) has two versions, and a function that chooses; arguments.py refuses the second.
    megatrons = getattr(adapter, "FullyShardedDataParallelV1", adapter.FullyShardedDataParallel)
    for wrapper, constructor in (
        (megatrons, megatron_fsdp.init),
        (TorchFullyShardedDataParallel, torch_fsdp2.init),
    ):
        stock: Any = vars(wrapper)["__init__"]
        if not isinstance(stock, partialmethod):
            wrapper.__init__ = partialmethod(constructor, stock)

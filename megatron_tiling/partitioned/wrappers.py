"""Megatron's two FSDP wrappers take each tile of a partitioned layer for a unit.

They wrap a model layer by layer, and so a whole layer is gathered at a time. With this, what is gathered is the tile
in use, the one after it, and the untiled rest (norms, biases, embeddings, layers left dense) as far as Megatron
gathers it.
"""

from collections.abc import Callable
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
        if wrapper.__init__.__module__ != __name__:
            wrapper.__init__ = _around(wrapper.__init__, constructor)


def _around(stock: Callable[..., None], constructor: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, stock, *args, **kwargs)

    return init

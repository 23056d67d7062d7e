"""Tiles as the units of Megatron-FSDP (``FullyShardedDataParallel``).

It takes classes of units, of which the outermost counts, so it is not given layers. What is in no unit stays gathered:
linear layers left dense are units too, if they have no bias (the bias is added by others, after the layer let it go).
It would prefetch some 500 million parameters, in the order of their names, which is not the one of their use; here it
gathers one unit ahead, the one that followed last time.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn import Parameter

from megatron_tiling.partitioned.modules import TILE_MODULES, tile_modules

DENSE = (ColumnParallelLinear, RowParallelLinear)


class _UnitType(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, TILE_MODULES) or (type(module) in DENSE and module.bias is None)


class Unit(metaclass=_UnitType):
    """What Megatron-FSDP gathers as one, as it asks for it: a class."""


def init(
    self: Any,
    stock: Callable[..., None],
    config: Any,
    ddp_config: Any,
    module: torch.nn.Module,
    fsdp_unit_modules: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """In place of the wrapper's ``__init__``, which is ``stock``: where a model has tiles, they are the units."""
    sizes = [sum(parameter.numel() for parameter in tile.parameters()) for tile in tile_modules(module)]
    by_tiles = fsdp_unit_modules is None and bool(sizes)
    stock(self, config, ddp_config, module, [Unit] if by_tiles else fsdp_unit_modules, *args, **kwargs)
    if by_tiles:
        gather_in_order_of_use(self.module)
        if ddp_config.suggested_communication_unit_size is None:
            self.module.suggested_RS_queue_capacity = max(sizes)  # elements of gradients on their way to be reduced


def gather_in_order_of_use(fsdp: Any) -> None:
    """Let a ``MegatronFSDP`` gather one unit ahead: the one that followed the last time, forward or backward.

    All ranks learn the same order: they have to gather in the same order anyway.
    """
    stock = fsdp.all_gather_and_wait_parameters_ready
    buffer = fsdp.param_and_grad_buffer
    followers: dict[tuple[Parameter, bool], tuple[list[Parameter], bool]] = {}
    last: tuple[Parameter, bool] | None = None

    def gather(params: list[Parameter], prefetch: bool = True, *, bwd: bool = False, **options: Any) -> None:
        nonlocal last
        stock(params, prefetch=False, bwd=bwd, **options)
        if not params or buffer.parameter_groups[buffer.param_to_param_group[params[0]]].fsdp_unit_id in (None, -1):
            return
        if last is not None:
            followers[last] = (params, bwd)
        last = (params[0], bwd)
        if last in followers:
            ahead, ahead_bwd = followers[last]
            stock(ahead, prefetch=False, bwd=ahead_bwd, **(options | {"wait_bucket_ready": False}))

    fsdp.all_gather_and_wait_parameters_ready = gather

"""Tiles as the sharding units of Megatron-FSDP and of torch FSDP2.

Megatron wraps a model for either of them layer by layer, and so a whole layer is gathered at a time. Here the two
wrappers' constructors come to take each tile of a partitioned layer for a unit: what is gathered is the tile in use,
the one after it, and the untiled rest (norms, biases, embeddings, layers left dense) as far as Megatron gathers it.

* Megatron-FSDP (``FullyShardedDataParallel``) takes classes of units, of which the outermost counts, so it is not
  given layers. What is in no unit stays gathered: linear layers left dense are units too, if they have no bias (the
  bias is added by others, after the layer let it go). It would prefetch some 500 million parameters, in the order of
  their names, which is not the one of their use; here it gathers one unit ahead, the one that followed last time.
* torch FSDP2 (``TorchFullyShardedDataParallel``) needs inner modules sharded before outer ones, which Megatron's
  wrapper does the other way round: tiles are sharded before it starts. FSDP2 itself prefetches one unit ahead. In a
  checkpoint, a rank's rows of a tile are a part of the dense weight (checkpoint.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.distributed import FullyShardedDataParallel, TorchFullyShardedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from megatron_tiling.partitioned_tiles import MLPTile, WeightTile

TILES = (WeightTile, MLPTile)
DENSE = (ColumnParallelLinear, RowParallelLinear)


class _UnitType(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, TILES) or (type(module) in DENSE and module.bias is None)


class Unit(metaclass=_UnitType):
    """What Megatron-FSDP gathers as one, as it asks for it: a class."""


def shard_by_tiles() -> None:
    """Have both of Megatron's wrappers shard partitioned layers tile by tile, from now on. Idempotent."""
    for wrapper, constructor in (
        (FullyShardedDataParallel, _init_megatron_fsdp),
        (TorchFullyShardedDataParallel, _init_torch_fsdp2),
    ):
        if wrapper.__init__.__module__ != __name__:
            wrapper.__init__ = _around(wrapper.__init__, constructor)


def _around(stock: Callable[..., None], constructor: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, stock, *args, **kwargs)

    return init


def tiles_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The tiles in a model, those of fc1 and fc2 in a tiled MLP two by two."""
    return [tile for tile in module.modules() if isinstance(tile, TILES)]


def _init_megatron_fsdp(
    self: Any,
    stock: Callable[..., None],
    config: Any,
    ddp_config: Any,
    module: torch.nn.Module,
    fsdp_unit_modules: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    tiles = tiles_of(module)
    by_tiles = fsdp_unit_modules is None and bool(tiles)
    units = [Unit] if by_tiles else fsdp_unit_modules
    largest = max((sum(p.numel() for p in tile.parameters()) for tile in tiles), default=0)
    stock(self, config, ddp_config, module, units, *args, **kwargs)
    if by_tiles:
        gather_in_order_of_use(self.module)
        if ddp_config.suggested_communication_unit_size is None:
            self.module.suggested_RS_queue_capacity = largest  # elements of gradients on their way to be reduced


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


def _init_torch_fsdp2(
    self: Any,
    stock: Callable[..., None],
    config: Any,
    ddp_config: Any,
    module: torch.nn.Module,
    *args: Any,
    process_group: ProcessGroup | None = None,
    **kwargs: Any,
) -> None:
    group = process_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
    shard_tiles(module, group, getattr(ddp_config, "reshard_after_forward", True))
    stock(self, config, ddp_config, module, *args, process_group=group, **kwargs)


def shard_tiles(module: torch.nn.Module, group: ProcessGroup, reshard_after_forward: bool = True) -> None:
    """Shard each tile of a model with FSDP2 over ``group``; what is around them can be sharded after that."""
    tiles = tiles_of(module)
    mesh = DeviceMesh.from_group(group, "cuda") if tiles else None
    for tile in tiles:
        attributes = {name: dict(vars(parameter)) for name, parameter in tile.named_parameters()}
        fully_shard(tile, mesh=mesh, reshard_after_forward=reshard_after_forward)
        for name, parameter in tile.named_parameters():  # new ones, without Megatron's attributes
            for attribute, value in attributes[name].items():
                setattr(parameter, attribute, value)
        if reshard_after_forward:
            _reshard_after_recompute(tile)


def refuse_ranks_without_rows(model: torch.nn.Module) -> None:
    """Raise a ValueError if FSDP2 would leave a rank nothing of some tile: stock cannot load such optimizer states."""
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for name, tile in model.named_modules():
        rows = min((parameter.shape[0] for parameter in tile.parameters()), default=0) if isinstance(tile, TILES) else 0
        chunk = -(-rows // ranks)  # of every rank but the last ones, as torch.chunk has it
        if rows and chunk * (ranks - 1) >= rows:
            raise ValueError(
                f"{name}: {rows} rows of a tile leave some of {ranks} data-parallel ranks without any, which cannot be "
                "saved and loaded; take fewer tiles, or leave out --save and --load"
            )


def restore_adam_step(optimizer: Any, checkpoint: Path) -> None:
    """Give torch's Adam the step of the states that were loaded.

    Under FSDP2 stock loads an optimizer's states in place, tensor by tensor; the step, which they share, it leaves.

    Args:
        optimizer: Megatron's.
        checkpoint: the ``torch_dist`` folder that it was loaded from, ``iter_0000100``.
    """
    for one in optimizer.chained_optimizers:
        states = one.optimizer.state
        if isinstance(one.optimizer, torch.optim.Adam) and any("step" not in state for state in states.values()):
            saved = load_common_state_dict(checkpoint)["optimizer"]
            step = saved.get("optimizer", saved)["state"]["common_step"]
            one._restore_common_per_param_step({"state": states}, step)


def _reshard_after_recompute(tile: Any) -> None:
    """FSDP2 keeps gathered what runs forward during a backward pass (recompute): all tiles of a layer."""
    gathered_before = False

    def note(module: Any, args: Any) -> None:
        nonlocal gathered_before
        gathered_before = not isinstance(next(tile.parameters()), DTensor)  # for its own backward pass

    def reshard(module: Any, args: Any, output: Any) -> None:
        if not gathered_before:
            tile.reshard()

    tile.register_forward_pre_hook(note, prepend=True)  # ahead of FSDP2's
    tile.register_forward_hook(reshard)

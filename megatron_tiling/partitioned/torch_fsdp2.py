"""Tiles as the units of torch FSDP2, under Megatron's wrapper (``TorchFullyShardedDataParallel``).

FSDP2 needs inner modules sharded before outer ones, which Megatron's wrapper does the other way round: tiles are
sharded before it starts. FSDP2 itself prefetches one unit ahead. In a checkpoint, a rank's rows of a tile are a part
of the dense weight (``partitioned/checkpoint.py``).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.optimizer as optimizer_checkpoint
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron_tiling.partitioned.checkpoint import local_tensor
from megatron_tiling.partitioned.modules import TILE_MODULES, tile_modules


def init(
    self: Any,
    stock: Callable[..., None],
    config: Any,
    ddp_config: Any,
    module: torch.nn.Module,
    *args: Any,
    process_group: ProcessGroup | None = None,
    **kwargs: Any,
) -> None:
    """In place of the wrapper's ``__init__``, which is ``stock``: tiles are sharded before what is around them."""
    group = process_group or parallel_state.get_data_parallel_group(with_context_parallel=True)
    shard_tiles(module, group, getattr(ddp_config, "reshard_after_forward", True))
    stock(self, config, ddp_config, module, *args, process_group=group, **kwargs)
    # Stock's own function calls to_local(), which in newer torch returns a new view of a parameter each time.
    optimizer_checkpoint.to_local_if_dtensor = local_tensor


def shard_tiles(module: torch.nn.Module, group: ProcessGroup, reshard_after_forward: bool = True) -> None:
    """Shard each tile of a model with FSDP2 over ``group``; what is around them can be sharded after that."""
    tiles = tile_modules(module)
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
        if not isinstance(tile, TILE_MODULES):
            continue
        rows = min((parameter.shape[0] for parameter in tile.parameters()), default=0)
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

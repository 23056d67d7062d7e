"""TiledMLP over partitioned layers: fc1 tile i and fc2 tile i are one module, which an engine gathers as one.

The two layers keep their place, their bias and their checkpoint keys; their tiles' parameters move into the units.
A layer that is called alone (an adapter around it, hooks) computes with the units' weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_tiling.partitioned.checkpoint import leave_to_dense_weights, missing_weights
from megatron_tiling.partitioned.layers import (
    PartitionedColumnParallelLinear,
    PartitionedRowParallelLinear,
    column_input,
)
from megatron_tiling.partitioned.modules import MLPTile, MLPTilePart
from megatron_tiling.resident.activation import activation_of
from megatron_tiling.resident.comm import comm_of
from megatron_tiling.resident.mlp import MLP_LAYERS, TiledMLP, run_weight_hooks
from megatron_tiling.tiles.grid import TileGrid

#: Modules whose hooks gather and release parameters, and look at nothing else.
ENGINES = ("deepspeed.", "torch.distributed.", "megatron.core.distributed.", "megatron_fsdp.")


class PartitionedMLP(TiledMLP):
    """``TiledMLP`` whose tiles are modules ``tiles[i]``, an ``MLPTile`` each; the output is their sum."""

    child_classes = ((PartitionedColumnParallelLinear,), (PartitionedRowParallelLinear,))
    takes_adapters = False
    tiles: Any

    @classmethod
    def _reason_in_hooks(cls, child: torch.nn.Module) -> str:
        hooks = (child._forward_pre_hooks, child._forward_hooks, child._backward_hooks, child._backward_pre_hooks)
        foreign = [hook for group in hooks for hook in group.values() if not _is_engine_hook(hook)]
        return "has hooks" if foreign else ""

    def _product(self, hidden_states: Tensor, per_token_scale: Tensor | None) -> tuple[Tensor, None]:
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        for child in (fc1, fc2):
            run_weight_hooks(child)
        activation = activation_of(self, scaled=per_token_scale is not None)
        hidden, saving = column_input(hidden_states, comm_of(fc1))
        output: Tensor | None = None
        with saving:
            for index, unit in enumerate(self.tiles):
                keep = self.keep is None or index < self.keep
                bias = activation.bias_of(fc1.bias, fc2.grid.columns(index))
                part = unit(hidden, activation=activation, bias=bias, scale=per_token_scale, keep=keep)
                # The first sum is a new tensor, which nothing else holds: the others are added in place.
                output = part if output is None else output + part if index == 1 else output.add_(part)
        assert output is not None
        return output, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Stock's entries; the two layers have one for each tile."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: entry for key, entry in entries.items() if not key.startswith(f"{prefix}tiles.")}

    @classmethod
    def reason_in_grids(cls, config: Any, fc1: TileGrid, fc2: TileGrid) -> str:
        if reason := super().reason_in_grids(config, fc1, fc2):
            return reason
        same = fc1.out_parts == fc2.in_parts and fc1.paired == config.gated_linear_unit
        return "" if same else "the tiles of fc1 and fc2 hold different features"

    def adopt_tiles(self) -> None:
        """Move the layers' tiles into units, the same parameters."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        fc1.tiles_are_elsewhere = fc2.tiles_are_elsewhere = True
        self.tiles = torch.nn.ModuleList()
        for index in range(fc2.grid.in_splits):
            fc1_row, fc2_row = fc1.tiles.linears[index], fc2.tiles.linears[0]
            unit = MLPTile(fc1_row[0].weight, fc2_row[index].weight)
            fc1_row[0], fc2_row[index] = MLPTilePart(unit, "fc1"), MLPTilePart(unit, "fc2")
            unit._register_state_dict_hook(leave_to_dense_weights)
            self.tiles.append(unit)
        self.register_load_state_dict_pre_hook(_note_missing_weights)


class PartitionedSharedExpertMLP(SharedExpertMLP, PartitionedMLP):
    """``SharedExpertMLP`` on top of ``PartitionedMLP``."""


PARTITIONED_MLP_CLASSES: dict[type[MLP], type[PartitionedMLP]] = {
    MLP: PartitionedMLP,
    SharedExpertMLP: PartitionedSharedExpertMLP,
}


def _note_missing_weights(
    mlp: Any, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
) -> None:
    """A hook before loading: says which weights are missing; the layers and the units load what is there."""
    for name, part in zip(MLP_LAYERS, MLPTile.weight_names, strict=True):
        own, layer = f"{prefix}tiles", f"{prefix}{name}."
        places = enumerate(getattr(mlp, name).grid.indices())
        keys = [(f"{own}.{index}.{part}", f"{layer}tiles.linears.{o}.{i}.weight") for index, (o, i) in places]
        missing += missing_weights(state_dict, layer, keys) if strict else []


def _is_engine_hook(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", "").startswith(ENGINES)

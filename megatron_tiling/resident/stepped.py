"""Column and row layers outside a TiledMLP, by steps of tokens, with tensor-parallel communication behind products.

What is computed, and in which order, stands in ``tiles/stepped_linear.py``; here it is when a call can go so.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.resident.comm import column_comm
from megatron_tiling.resident.stock_code import replaced_in_layers
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.device import in_capture
from megatron_tiling.tiles.step_comm import steps_for
from megatron_tiling.tiles.stepped_linear import LinearSteps, stepped_column, stepped_row


def reason_in_group(layer: Any) -> str:
    """Why a layer, stock or tiled, communicates with nobody itself, or nothing."""
    if getattr(layer, "explicit_expert_comm", getattr(layer, "parallel_mode", "") is None):
        return "an expert"
    group = getattr(layer, "tp_group", None)
    return "" if group is not None and group.size() > 1 else "one tensor-parallel rank"


def reason_for_no_steps(layer: Any, is_row: bool) -> str:
    """Why communication never runs behind the products of a layer, stock or tiled, or nothing."""
    if reason := reason_in_group(layer):
        return reason
    # Of TransformerEngine's layers: Megatron-Bridge sets both.
    gathers_norm = all(getattr(layer, f"return_layernorm_output{which}", False) for which in ("", "_gathered"))
    refusals = {
        "without sequence parallelism nothing is exposed": not (is_row or layer.sequence_parallel),
        "an adapter takes the gathered input too": gathers_norm,
        "gathers its output": getattr(layer, "gather_output", False),  # TransformerEngine's never do
        "splits its input itself": not getattr(layer, "input_is_parallel", True),
        "activations are offloaded to the CPU": getattr(layer.config, "cpu_offloading", False),
    }
    return next((reason for reason, applies in refusals.items() if applies), "")


@torch.compiler.disable
def column_in_steps(layer: Any, input_: Any, weight: Tensor, bias: Tensor | None, comm: ColumnComm) -> Tensor | None:
    """The product of a tiled column layer, as ``tiles.linear.tiled_linear`` gives it, or ``None``: not by steps now."""
    if not comm.sequence_parallel:
        return None
    steps = _steps_now(layer, input_, is_row=False)
    return None if steps == 1 else stepped_column(input_, weight, bias, _loop(layer, steps, comm))


@torch.compiler.disable
def row_in_steps(layer: Any, input_: Any) -> Tensor | None:
    """The product of a tiled row layer, summed over ranks, without bias, or ``None``: not by steps now."""
    steps = _steps_now(layer, input_, is_row=True)
    if steps == 1:
        return None
    comm = column_comm(layer.tp_group, layer.sequence_parallel, not layer.sequence_parallel)
    assert comm is not None
    return stepped_row(input_, layer.weight, _loop(layer, steps, comm))


def _loop(layer: Any, steps: int, comm: ColumnComm) -> LinearSteps:
    return LinearSteps(steps, comm, layer.gradient_accumulation_fusion, layer.transport)


def _steps_now(layer: Any, input_: Any, is_row: bool) -> int:
    """In how many steps of tokens a call now goes; 1: not by steps."""
    if not isinstance(input_, Tensor) or input_.dim() < 2 or not layer.combine_out_splits:
        return 1
    if reason_for_no_steps(layer, is_row) or layer.reason_to_be_called() or replaced_in_layers():
        return 1
    if torch.is_autocast_enabled(input_.device.type) or in_capture():
        return 1
    ranks = layer.tp_group.size() if layer.sequence_parallel else 1
    if is_row and input_.shape[0] % ranks:
        return 1
    tokens = input_[..., 0].numel() * (1 if is_row else ranks)
    return steps_for(tokens, layer.overlap_steps, layer.least_overlap_tokens)

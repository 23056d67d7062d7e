"""The LM head in tiles: an output layer whose logits the stock loss of the same call consumes tile by tile.

``convert_head`` turns a built model's output layer into a ``TiledOutputLayer``, in place, and gives this one model a
loss that takes lazy logits. The model's own code stays as it is: it calls the output layer (whose pre-hooks run),
perhaps scales the logits, and hands them to ``compute_language_model_loss``, once for each prediction head.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from megatron_tiling.config import TilingConfig
from megatron_tiling.resident.comm import mpu_buffer
from megatron_tiling.resident.layers import TiledColumnParallelLinear
from megatron_tiling.resident.lazy_logits import LazyLogits, compute_language_model_loss, has_tiled_loss, stock_caller
from megatron_tiling.resident.stock_code import PREDICTION_LOSSES, calls_the_loss, reason_for_whole_logits
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.device import in_capture
from megatron_tiling.tiles.head import HeadLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.stepped_linear import LinearSteps


class TiledOutputLayer(TiledColumnParallelLinear):
    """A tiled column layer that returns lazy logits to Megatron's own code where that hands them to the tiled loss.

    Everybody else gets dense logits, computed tile by tile as in any column layer; so does everybody where logits are
    gathered, where forward or backward hooks look at them, with a bias, under autocast and ``torch.compile``, and in
    inference mode.

    Args:
        head_tiles: memory bound and sizes of the loss's tiles.
    """

    head_tiles: HeadTiles

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> ``[s, b, v]``, maybe lazy, and bias."""
        whole = self.makes_logits(input_.device, runtime_gather_output)
        caller = "" if whole else stock_caller(sys._getframe(1))
        if not caller:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        loop = self.loss_loop(keep_largest=caller == PREDICTION_LOSSES)
        return LazyLogits(input_, self.weight if weight is None else weight, loop), None

    def makes_logits(self, device: torch.device, runtime_gather_output: bool | None = None) -> bool:
        """Whether logits have to be made, whoever calls."""
        gathered = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return bool(
            gathered
            or self.bias is not None
            or self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _has_any_global_hook()
            or torch.is_inference_mode_enabled()
            or torch.is_autocast_enabled(device.type)
            or torch.compiler.is_compiling()
        )

    def loss_loop(self, *, keep_largest: bool = False) -> HeadLoop:
        """How losses are computed without logits."""
        tiles = self.head_tiles
        if keep_largest and tiles.keep is None:  # prediction heads: all their losses come before any backward pass
            tiles = replace(tiles, keep=0)
        return replace(head_loop(self, tiles), keep_largest=keep_largest)


def head_loop(layer: ColumnParallelLinear, tiles: HeadTiles) -> HeadLoop:
    """How a tile loop takes the place of an output layer, tiled or stock: its collectives, where its gradient goes."""
    comm = group = None
    sequence_parallel = layer.sequence_parallel and not layer.explicit_expert_comm
    if layer.tp_group is not None and layer.tp_group.size() > 1:
        group = layer.tp_group
        reduces = not (sequence_parallel or layer.explicit_expert_comm or layer.disable_grad_reduce)
        comm = ColumnComm(group, sequence_parallel, reduces, mpu_buffer)
    overlap_steps = getattr(layer, "overlap_steps", None)
    steps = None
    if overlap_steps is not None and comm is not None and sequence_parallel and not in_capture():
        steps = LinearSteps(overlap_steps, comm, transport=layer.transport, least_tokens=layer.least_overlap_tokens)
    return HeadLoop(tiles, group, comm, steps, fuse_wgrad=layer.gradient_accumulation_fusion)


def check_head(model: LanguageModule, config: TilingConfig) -> str:
    """Whether ``convert_head`` can compute the model's loss tile by tile; changes nothing.

    Args:
        model: a built model or pipeline stage, not yet wrapped; its output layer may be stock still.
        config: ``splits["output"]`` fixes the number of vocabulary tiles and ``head_tokens`` the tokens of a tile;
            otherwise ``head_memory_mib`` chooses them. ``head_keep`` says how many stay for the backward pass.

    Returns:
        Why the logits stay whole, or ``""``.

    Raises:
        ValueError: a size out of range, or a setting that the head cannot honour, naming its flag.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return "this pipeline stage has no output layer"
    if type(layer) not in (ColumnParallelLinear, TiledColumnParallelLinear, TiledOutputLayer):
        return f"{type(layer).__name__} is not a stock column layer"
    if layer.bias is not None:
        return "the output layer has a bias"
    in_splits, out_splits = config.splits_of("output")
    if in_splits > 1:
        raise ValueError(
            f"--tiled-linear-splits output={in_splits}x{out_splits}: the LM head is tiled over tokens and vocabulary; "
            f"write output=1x{out_splits}"
        )
    columns = layer.output_size_per_partition
    if "output" in config.splits and out_splits > columns:
        raise ValueError(f"--tiled-linear-splits output=1x{out_splits}: a rank's vocabulary has {columns} columns")
    own_loss = vars(model).get("compute_language_model_loss")
    if own_loss is not None and not has_tiled_loss(own_loss):
        return "this model was given a compute_language_model_loss of its own"
    if not calls_the_loss(model):
        return f"the code of {type(model).__name__} that calls the loss is not Megatron's own"
    return reason_for_whole_logits(model)


def convert_head(model: LanguageModule, config: TilingConfig) -> str:
    """Compute the model's loss tile by tile from now on. In place; nothing is drawn or copied.

    Args:
        model, config: as for ``check_head``; the output layer is a ``TiledColumnParallelLinear``.

    Returns:
        Why the logits stay whole, or ``""``.

    Raises:
        ValueError: as ``check_head``.
    """
    reason = check_head(model, config)
    if not reason:
        layer: Any = model.output_layer
        assert type(layer) is not ColumnParallelLinear, "convert_head takes an output layer that is tiled"
        layer.__class__ = TiledOutputLayer
        layer.head_tiles = head_tiles(config)
        model.compute_language_model_loss = MethodType(compute_language_model_loss, model)
    return reason


def head_tiles(config: TilingConfig) -> HeadTiles:
    """Bound and sizes of the loss's tiles."""
    vocabulary = config.splits_of("output")[1] if "output" in config.splits else None
    return HeadTiles(config.head_memory_mib, config.head_tokens, vocabulary, config.head_keep)

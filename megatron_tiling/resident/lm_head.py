"""The LM head in tiles: an output layer whose logits a language model's loss consumes tile by tile.

``convert_head`` turns a built model's output layer into a ``TiledOutputLayer``, in place, and gives this one model a
loss that recognises its lazy logits. The model's own code stays as it is: it calls the output layer (whose pre-hooks
run), perhaps scales the logits, and hands them to ``compute_language_model_loss``, once for each prediction head.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_tiling.config import TilingConfig
from megatron_tiling.resident.layers import TiledColumnParallelLinear, mpu_buffer
from megatron_tiling.resident.lazy_logits import LazyLogits, lazy_linear
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.head import CrossEntropyLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.linear import TileLoop


class TiledOutputLayer(TiledColumnParallelLinear):
    """A tiled column layer that returns lazy logits where its caller can do with them.

    It computes dense logits, tile by tile as any column layer, where they are gathered, where forward or backward
    hooks look at them, with a bias, under autocast and ``torch.compile``, and in inference mode.

    Args:
        head_tiles: memory bound and sizes of the loss's tiles. A micro-batch may be smaller than a tile.
        keep_largest: the loss finds each token's largest logit too, for multi-token prediction's statistics.
    """

    head_tiles: HeadTiles
    keep_largest: bool
    _lazy = False

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, Tensor | None]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> ``[s, b, v]``, maybe lazy, and bias."""
        gathered = self.gather_output if runtime_gather_output is None else runtime_gather_output
        self._lazy = not (
            gathered
            or self.bias is not None
            or self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or torch.is_inference_mode_enabled()
            or torch.is_autocast_enabled(input_.device.type)
            or torch.compiler.is_compiling()
        )
        try:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        finally:
            self._lazy = False

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Any:  # type: ignore[override]
        if not self._lazy:
            return super()._forward_impl(input, weight, **options)
        fuse_wgrad, tp_group = options["gradient_accumulation_fusion"], options["tp_group"]
        sequence_parallel, allreduce_dgrad = options["sequence_parallel"], options["allreduce_dgrad"]
        comm = group = None
        if tp_group is not None and tp_group.size() > 1:
            group = tp_group
            if sequence_parallel or allreduce_dgrad:
                comm = ColumnComm(tp_group, sequence_parallel, allreduce_dgrad, mpu_buffer)
        tiles = self.head_tiles
        if tiles.tokens is not None:
            tokens = math.prod(input.shape[:-1]) * (tp_group.size() if sequence_parallel else 1)
            tiles = replace(tiles, tokens=max(1, min(tiles.tokens, tokens)))
        linear = TileLoop(self.grid, fuse_wgrad=fuse_wgrad, fp32_accumulate=self.fp32_accumulate, comm=comm)
        loop = CrossEntropyLoop(tiles, group, comm, fuse_wgrad=fuse_wgrad, keep_largest=self.keep_largest)
        return lazy_linear(input, weight, linear, loop)


def compute_language_model_loss(model: LanguageModule, labels: Tensor, logits: Tensor) -> Tensor:
    """Megatron's method of this name, which takes lazy logits without making them.

    Args:
        labels: ``[b, s]``.
        logits: ``[s, b, v]``; those that somebody has looked at go Megatron's way.

    Returns:
        Losses ``[b, s]``.
    """
    if isinstance(logits, LazyLogits):
        if logits.pending:
            losses = logits.cross_entropy(labels.transpose(0, 1).contiguous())
            return losses.transpose(0, 1).contiguous()
        logits = logits.dense()
    losses = type(model).compute_language_model_loss(model, labels, logits)
    return losses


def check_head(model: LanguageModule, config: TilingConfig) -> str:
    """Whether ``convert_head`` can compute the model's loss tile by tile; changes nothing.

    Args:
        model: a built model or pipeline stage, not yet wrapped; its output layer may be stock still.
        config: ``splits["output"]`` fixes the number of vocabulary tiles and ``head_tokens`` the tokens of a tile;
            otherwise ``head_memory_mib`` chooses them.

    Returns:
        Why the head stays as it is, or ``""``.

    Raises:
        ValueError: a size out of range, or a setting that the head cannot honour, naming its flag.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return "this pipeline stage has no output layer"
    if type(layer) not in (ColumnParallelLinear, TiledColumnParallelLinear):
        return f"{type(layer).__name__} is not a stock column layer"
    if layer.bias is not None:
        return "the output layer has a bias"
    if type(model).compute_language_model_loss is not LanguageModule.compute_language_model_loss:
        return f"{type(model).__name__} has a loss of its own"
    if model.config.cross_entropy_loss_fusion and model.config.cross_entropy_fusion_impl == "te":
        raise ValueError(
            "--cross-entropy-fusion-impl te: the tiled LM head computes the loss itself, fused already; use native, "
            "leave out --cross-entropy-loss-fusion, or leave output out of --tiled-linear-modules"
        )
    in_splits, out_splits = config.splits_of("output")
    if in_splits > 1:
        raise ValueError(
            f"--tiled-linear-splits output={in_splits}x{out_splits}: the LM head is tiled over tokens and vocabulary; "
            f"write output=1x{out_splits}"
        )
    _head_tiles(config).check(tokens=None, vocabulary=layer.output_size_per_partition)
    return ""


def convert_head(model: LanguageModule, config: TilingConfig) -> str:
    """Compute the model's loss tile by tile from now on. In place; nothing is drawn or copied.

    Args:
        model, config: as for ``check_head``.

    Returns:
        Why the head stays as it is, or ``""``.

    Raises:
        ValueError: as ``check_head``.
    """
    if reason := check_head(model, config):
        return reason
    layer, (in_splits, out_splits) = model.output_layer, config.splits_of("output")
    built_stock = type(layer) is ColumnParallelLinear
    layer.__class__ = TiledOutputLayer
    if built_stock:
        splits = in_splits, min(out_splits, layer.output_size_per_partition)
        layer.set_tiles(*splits, fp32_accumulate=config.fp32_accumulate)
        if config.fuse_wgrad is not None:
            layer.gradient_accumulation_fusion = config.fuse_wgrad
    layer.head_tiles = _head_tiles(config)
    layer.keep_largest = bool(getattr(model.config, "mtp_num_layers", None))
    model.compute_language_model_loss = MethodType(compute_language_model_loss, model)
    return ""


def _head_tiles(config: TilingConfig) -> HeadTiles:
    vocabulary = config.splits_of("output")[1] if "output" in config.splits else None
    return HeadTiles(config.head_memory_mib, config.head_tokens, vocabulary)

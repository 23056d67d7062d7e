"""Scores out of a Megatron model: what ``GPTModel.forward(output_processor=...)`` takes, from megatron-core 0.18 on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from megatron_tiling.resident.layers import TiledColumnParallelLinear
from megatron_tiling.resident.lm_head import TiledOutputLayer, head_loop
from megatron_tiling.resident.stock_code import SCALE_LOGITS, is_stock
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.scores import Scores, scores_of
from megatron_tiling.tiles.softmax import LogitScale


def score_processor(
    columns: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int = 0,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    logits_in_fp32: bool = False,
    softcap: float | None = None,
    memory_mib: int | None = None,
) -> Callable[..., Scores]:
    """An ``output_processor``: the model's forward pass returns scores, and makes no logits.

    The model may be tiled or not, its output weight that of the embedding or its own, its logits scaled by MuP. With
    multi-token prediction, the losses of the prediction heads are computed before, as ever. Gradients go where the
    output layer's go. Pre-hooks of the output layer run.

    Args:
        columns: ``[b, s]`` or ``[b, s, k]`` int64, as Megatron has labels.
        mask: ``[b, s]``.
        memory_mib: ``None`` is the output layer's own bound if it is tiled, else ``--tiled-head-memory-mib``'s default.
        temperature, entropy, top_k, mask_count, logits_in_fp32, softcap: as for ``tiled_scores``.

    Returns:
        A processor whose scores are ``[b, s]`` or ``[b, s, k]``.

    Raises:
        ValueError: this Megatron's GPT takes no processor. When the processor is called: an output layer whose logits
            somebody looks at or changes, and what ``tiled_scores`` refuses.
    """
    if "output_processor" not in inspect.signature(GPTModel.forward).parameters:
        raise ValueError("score_processor: GPTModel.forward has no output_processor before megatron-core 0.18")

    def process(
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        **unused: Any,
    ) -> Scores:
        refuse_onlookers(output_layer, scale_logits)
        tiles = output_layer.head_tiles if isinstance(output_layer, TiledOutputLayer) else HeadTiles()
        if memory_mib is not None:
            tiles = replace(tiles, memory_mib=memory_mib)
        loop = replace(
            head_loop(output_layer, tiles),
            scale=LogitScale(float(scale_logits(torch.ones(()))), softcap, temperature),
            logits_in_fp32=logits_in_fp32,
            entropy=entropy,
            top_k=top_k,
        )

        def forward(input_: Tensor, weight: Tensor | None = None, **unused: Any) -> Scores:
            weight = output_layer.weight if weight is None else weight
            chosen, wanted = columns.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
            return scores_of(input_, weight, chosen, loop, wanted, mask_count)

        with forward_of(output_layer, forward):
            scores: Scores = output_layer(hidden_states, weight=output_weight)
        return scores.transposed()

    return process


def refuse_onlookers(layer: ColumnParallelLinear, scale_logits: Callable[[Tensor], Tensor]) -> None:
    """Refuse an output layer of which somebody would get to see or change logits that are not made.

    Raises:
        ValueError: naming what it is.
    """
    kinds = (ColumnParallelLinear, TiledColumnParallelLinear, TiledOutputLayer)
    hooks = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook()
    for found, reason in (
        (type(layer) not in kinds, f"the output layer is a {type(layer).__name__}, not Megatron's own"),
        ("forward" in vars(layer), "the output layer has a forward of its own"),
        (bool(hooks), "forward or backward hooks look at logits"),
        (layer.bias is not None, "the output layer has a bias"),
        (not is_stock(scale_logits, SCALE_LOGITS), "code that is not Megatron's scales logits"),
    ):
        if found:
            raise ValueError(f"score_processor: {reason}; compute log-probabilities from logits here")


@contextmanager
def forward_of(layer: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of ``layer`` run its pre-hooks, which may gather its weight, and then this."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward

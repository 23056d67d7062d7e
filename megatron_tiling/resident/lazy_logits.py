"""Logits that are never made: what a tiled output layer hands to the stock loss of the same call.

``LazyLogits`` stands for logits between Megatron's own call of the output layer and Megatron's own loss, where nobody
looks at them. It is no tensor: code that takes it for one raises. Whoever else calls the output layer gets a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn, Self

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.nn.modules import module as torch_module

from megatron_tiling.resident.stock_code import (
    CALLERS,
    PREDICTION_LOSSES,
    SCALE_LOGITS,
    is_stock,
    origin,
    reason_for_whole_logits,
)
from megatron_tiling.tiles.head import HeadLoop, TokenLosses, tiled_linear_cross_entropy


@dataclass(repr=False, eq=False)
class LazyLogits:
    """Logits ``[s, b, v]`` of one rank's columns of the vocabulary, for ``compute_language_model_loss`` below.

    Beside the loss it knows what stock does with them: products with numbers, and the largest logits and their columns,
    which multi-token prediction asks for after the loss.

    Args:
        hidden, weight: the output layer's input and its weight, in the autograd graph.
        loop: how to compute their cross entropy.
    """

    hidden: Tensor
    weight: Tensor
    loop: HeadLoop
    losses: TokenLosses | None = None

    def __mul__(self, number: float) -> Self:
        scale = replace(self.loop.scale, scale=self.loop.scale.scale * number)
        return replace(self, loop=replace(self.loop, scale=scale))

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Loss of each token, ``[s, b]`` for labels ``[s, b]``."""
        self.losses = tiled_linear_cross_entropy(self.hidden, self.weight, labels, self.loop)
        return self.losses.loss

    def size(self, dim: int) -> int:
        return len(self.weight) if dim == -1 else self._refuse("size", dim)

    def max(self, dim: int) -> tuple[Tensor, Tensor]:
        """Each token's largest logit and its column, ``[s, b]``, once there is the loss."""
        if dim != -1 or self.losses is None or self.losses.largest is None or self.losses.argmax is None:
            self._refuse("max", dim)
        return self.losses.largest, self.losses.argmax

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.argmax and kwargs == {"dim": -1} and len(args) == 1:
            return args[0].max(dim=-1)[1]
        return cls._refuse(getattr(func, "__name__", func))

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    @staticmethod
    def _refuse(*operation: Any) -> NoReturn:
        raise TypeError(
            f"{' '.join(map(str, operation))}: these logits go from the output layer to the model's loss in tiles and "
            "never exist; to look at them, leave output out of --tiled-linear-modules"
        )


def compute_language_model_loss(model: LanguageModule, labels: Tensor, logits: Tensor | LazyLogits) -> Tensor:
    """Megatron's method of this name, which takes lazy logits too.

    Args:
        labels: ``[b, s]``.
        logits: ``[s, b, v]``.

    Returns:
        Losses ``[b, s]``.
    """
    if isinstance(logits, LazyLogits):
        return logits.cross_entropy(labels.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()
    losses: Tensor = type(model).compute_language_model_loss(model, labels, logits)
    return losses


def has_tiled_loss(loss: Any) -> bool:
    """Whether a model's ``compute_language_model_loss`` is the one above."""
    return getattr(loss, "__func__", None) is compute_language_model_loss


def stock_caller(frame: FrameType) -> str:
    """Who calls the output layer, if it is Megatron's own code that hands its logits to the loss above; else ``""``.

    Args:
        frame: what has called the output layer's ``forward``.
    """
    while frame.f_globals is vars(torch_module) and frame.f_back is not None:
        frame = frame.f_back
    caller = origin(frame.f_code, frame.f_globals)
    if caller not in CALLERS:
        return ""
    given = frame.f_locals
    loss: Any
    if caller == PREDICTION_LOSSES:
        loss, scale_logits = given.get("compute_language_model_loss"), given.get("scale_logits_fn")
    else:
        loss, scale_logits = getattr(given.get("self"), "compute_language_model_loss", None), None  # its own: see below
    if given.get("labels") is None or not has_tiled_loss(loss):
        return ""
    if scale_logits is not None and not is_stock(scale_logits, SCALE_LOGITS):
        return ""
    return "" if reason_for_whole_logits(loss.__self__) else caller

"""What the head does to a tile of logits: softmax statistics of its tokens, and its gradient in place.

Two functions, in torch here and as Triton kernels in ``kernels/softmax.py``. A tile has ``n_t`` tokens and
``v_t`` columns, ``first_column`` and on of this rank's; labels are numbered as those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What is known of the logits of each token, ``[n]``, in float32 or wider; a tile of them changes it in place.

    Args:
        largest, sum_exp: the largest logit so far and the sum of ``exp(logit - largest)``.
        label_logit: the label's, if it was among the columns so far.
        argmax: the column of the largest; ``None`` if not wanted.
    """

    largest: Tensor
    sum_exp: Tensor
    label_logit: Tensor
    argmax: Tensor | None = None

    @classmethod
    def of_no_logits(cls, labels: Tensor, dtype: torch.dtype, *, argmax: bool = False) -> Statistics:
        """Those of the tokens of ``labels [n]`` to begin with."""
        zeros = torch.zeros(2, len(labels), dtype=dtype, device=labels.device)
        largest = torch.full_like(zeros[0], float("-inf"))
        return cls(largest, zeros[0], zeros[1], torch.zeros_like(labels) if argmax else None)

    def of(self, tokens: slice) -> Statistics:
        """Views of some tokens' statistics."""
        whole: dict[str, Tensor | None] = vars(self)
        parts: dict[str, Any] = {name: None if value is None else value[tokens] for name, value in whole.items()}
        return Statistics(**parts)


def update_statistics(logits: Tensor, first_column: int, labels: Tensor, scale: float, statistics: Statistics) -> None:
    """Take a tile of logits ``[n_t, v_t]`` into the statistics of its tokens.

    Args:
        labels: ``[n_t]``; others than this tile's columns are passed over.
        scale: multiplies the logits before all else.
    """
    largest, sum_exp, label_logit = statistics.largest, statistics.sum_exp, statistics.label_logit
    scaled = logits.to(sum_exp.dtype) * scale
    tile_largest, tile_argmax = scaled.max(dim=-1)
    if statistics.argmax is not None:
        statistics.argmax.copy_(torch.where(tile_largest > largest, first_column + tile_argmax, statistics.argmax))
    new_largest = torch.maximum(largest, tile_largest)
    shift = torch.where(torch.isneginf(new_largest), 0.0, new_largest)  # nothing but -inf so far: -inf less 0
    sum_exp *= torch.exp(largest - shift)
    sum_exp += torch.exp(scaled - shift[:, None]).sum(dim=-1)
    largest.copy_(new_largest)
    columns, here = _columns_of_labels(labels, first_column, logits.shape[1])
    label_logit.copy_(torch.where(here, scaled.gather(1, columns[:, None]).squeeze(1), label_logit))


def logits_to_gradient(
    logits: Tensor, first_column: int, labels: Tensor, log_sum_exp: Tensor, grad_loss: Tensor, scale: float
) -> None:
    """Overwrite a tile of logits with the gradient of the losses with respect to it.

    ``(exp(scale * logit - log_sum_exp) - onehot(label)) * grad_loss * scale``

    Args:
        logits: ``[n_t, v_t]``.
        labels, log_sum_exp, grad_loss: ``[n_t]``.
    """
    gradient = torch.exp(logits.to(log_sum_exp.dtype) * scale - log_sum_exp[:, None])
    columns, here = _columns_of_labels(labels, first_column, logits.shape[1])
    gradient.scatter_add_(1, columns[:, None], -here[:, None].to(gradient.dtype))
    logits.copy_(gradient * (grad_loss * scale)[:, None])


def _columns_of_labels(labels: Tensor, first_column: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column in the tile, 0 if it has none there, and whether it has one."""
    column = labels - first_column
    here = (column >= 0) & (column < columns)
    return torch.where(here, column, 0), here

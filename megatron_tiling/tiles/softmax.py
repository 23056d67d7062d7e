"""What the head does to a tile of logits: softmax statistics of its tokens, and its gradient in place.

Two functions, in torch here and as Triton kernels in ``kernels/softmax.py``. A tile has ``n_t`` tokens and ``v_t``
columns, ``first_column`` and on of this rank's; the ``k`` chosen columns of a token are numbered as those.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitScale:
    """How products of hidden states and weight become logits: ``cap * tanh(scale * product / cap) / temperature``.

    Args:
        scale: multiplies products before all else.
        softcap: ``None`` leaves the tanh out.
        temperature: divides last.

    Raises:
        ValueError: a softcap or temperature that is not positive, or infinite.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{name} {value}: must be greater than 0, and finite")

    @property
    def slope(self) -> float:
        """Of a logit by its product, but for the tanh's."""
        return self.scale / self.temperature

    def __call__(self, products: Tensor) -> Tensor:
        if self.softcap is None:
            return products * self.slope
        return torch.tanh(products * (self.scale / self.softcap)) * (self.softcap / self.temperature)


@dataclass(frozen=True)
class Statistics:
    """What is known of the logits of each token, ``[n]``, in float32 or wider; a tile of them changes it in place.

    Args:
        largest, sum_exp: the largest logit so far and the sum of ``exp(logit - largest)``.
        column_logits: ``[n, k]``, those of the chosen columns that were among the columns so far.
        weighted: the sum of ``exp(logit - largest) * (logit - largest)``; ``None`` if not wanted.
        argmax: the column of the largest; ``None`` if not wanted.
    """

    largest: Tensor
    sum_exp: Tensor
    column_logits: Tensor
    weighted: Tensor | None = None
    argmax: Tensor | None = None

    @classmethod
    def of_no_logits(
        cls, columns: Tensor, dtype: torch.dtype, *, weighted: bool = False, argmax: bool = False
    ) -> Statistics:
        """Those of the tokens of ``columns [n, k]`` to begin with."""
        zeros = torch.zeros(3, len(columns), dtype=dtype, device=columns.device)
        return cls(
            torch.full_like(zeros[0], float("-inf")),
            zeros[1],
            torch.zeros_like(columns, dtype=dtype),
            zeros[2] if weighted else None,
            columns.new_zeros(len(columns)) if argmax else None,
        )

    def of(self, tokens: slice) -> Statistics:
        """Views of some tokens' statistics."""
        whole: dict[str, Tensor | None] = vars(self)
        parts: dict[str, Any] = {name: None if value is None else value[tokens] for name, value in whole.items()}
        return Statistics(**parts)


class TokenGradients(NamedTuple):
    """What the gradient of a tile of logits takes of each token; of the entropy nothing if it has no gradient.

    Attributes:
        log_sum_exp: ``[n]``.
        of_columns: ``[n, k]``, the gradient of the log-probabilities of the chosen columns.
        of_entropy: ``[n]``, the gradient of the entropy.
        entropy: ``[n]``.
    """

    log_sum_exp: Tensor
    of_columns: Tensor
    of_entropy: Tensor | None = None
    entropy: Tensor | None = None

    def of(self, tokens: slice) -> TokenGradients:
        return TokenGradients(*(None if value is None else value[tokens] for value in self))  # type: ignore[arg-type]


def update_statistics(
    products: Tensor, first_column: int, columns: Tensor, scale: LogitScale, statistics: Statistics
) -> None:
    """Take a tile ``[n_t, v_t]`` into the statistics of its tokens.

    Args:
        columns: ``[n_t, k]``; others than this tile's are passed over.
    """
    largest, sum_exp, weighted = statistics.largest, statistics.sum_exp, statistics.weighted
    logits = scale(products.to(sum_exp.dtype))
    tile_largest, tile_argmax = logits.max(dim=-1)
    if statistics.argmax is not None:
        statistics.argmax.copy_(torch.where(tile_largest > largest, first_column + tile_argmax, statistics.argmax))
    new_largest = torch.maximum(largest, tile_largest)
    shift = torch.where(torch.isneginf(new_largest), 0.0, new_largest)  # nothing but -inf so far: -inf less 0
    shifted = logits - shift[:, None]
    exp = shifted.exp()
    if weighted is not None:
        shift_weighted(weighted, sum_exp, largest - shift)
        weighted += torch.where(exp > 0, exp * shifted, 0.0).sum(dim=-1)
    sum_exp *= torch.exp(largest - shift)
    sum_exp += exp.sum(dim=-1)
    largest.copy_(new_largest)
    here, at = _columns_here(columns, first_column, products.shape[1])
    column_logits = statistics.column_logits
    column_logits.copy_(torch.where(here, logits.gather(1, at), column_logits))


def shift_weighted(weighted: Tensor, sum_exp: Tensor, shift: Tensor) -> None:
    """What ``weighted`` is for logits that are larger than another number, by ``shift``, in place."""
    weighted += torch.where(sum_exp > 0, sum_exp * shift, 0.0)
    weighted *= torch.exp(shift)


def logits_to_gradient(
    products: Tensor, out: Tensor, first_column: int, columns: Tensor, scale: LogitScale, gradients: TokenGradients
) -> None:
    """The gradient of log-probabilities and entropies with respect to a tile of products.

    With ``p`` of a logit, the gradients ``g`` of the token's columns and ``e`` of its entropy ``H``, that of a logit is
    ``g`` where it is a chosen column, less ``p * (sum(g) + e * (log(p) + H))``.

    Args:
        products: ``[n_t, v_t]``.
        out: ``[n_t, v_t]``, the same memory or other; of the dtype that the products' operands have.
        columns: ``[n_t, k]``.
        gradients: of the tile's tokens.
    """
    dtype = gradients.log_sum_exp.dtype
    logits = scale(products.to(dtype))
    slope = torch.full_like(logits, scale.slope)
    if scale.softcap is not None:
        slope *= 1 - (logits * (scale.temperature / scale.softcap)).square()
    log_p = logits - gradients.log_sum_exp[:, None]
    p = log_p.exp()
    gradient = -p * gradients.of_columns.sum(dim=1, keepdim=True)
    if gradients.of_entropy is not None and gradients.entropy is not None:
        pull = p * (log_p + gradients.entropy[:, None]) * gradients.of_entropy[:, None]
        gradient -= torch.where(p > 0, pull, 0.0)
    here, at = _columns_here(columns, first_column, products.shape[1])
    gradient.scatter_add_(1, at, torch.where(here, gradients.of_columns, 0.0))
    out.copy_(gradient * slope)


def _columns_here(columns: Tensor, first_column: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether chosen columns are in the tile, and where, or 0."""
    at = columns - first_column
    here = (at >= 0) & (at < width)
    return here, torch.where(here, at, 0)

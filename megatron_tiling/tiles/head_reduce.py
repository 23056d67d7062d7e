"""Statistics of a rank's logits become scores over the whole vocabulary; and the largest logits of each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.softmax import LogitScale, Statistics, shift_weighted


class Largest:
    """The largest logits of each token so far, and their columns in the whole vocabulary, ``[n, k]``."""

    def __init__(self, k: int, scale: LogitScale, statistics: Statistics) -> None:
        self._scale = scale
        self.logits = statistics.largest.new_full((len(statistics.largest), k), float("-inf"))
        self.columns = torch.zeros_like(self.logits, dtype=torch.int64)

    def add(self, tokens: slice, products: Tensor, first_column: int) -> None:
        """Take in a tile ``[n_t, v_t]``; logits rise, or fall, with products."""
        k = self.logits.shape[1]
        values, columns = products.topk(min(k, products.shape[1]), dim=1, largest=self._scale.slope > 0)
        logits = torch.cat([self.logits[tokens], self._scale(values.to(self.logits.dtype))], dim=1)
        columns = torch.cat([self.columns[tokens], columns + first_column], dim=1)
        self.logits[tokens], of_these = logits.topk(k, dim=1)
        self.columns[tokens] = columns.gather(1, of_these)

    def rows(self, rank: int, ranks: int) -> Tensor:
        """``[ranks * 2 * k, n]``, zero but for this rank's, for a sum over ranks. Float32 holds columns up to 2^24."""
        rows = self.logits.new_zeros(ranks, 2, *self.logits.t().shape)
        rows[rank] = torch.stack([self.logits.t(), self.columns.t()])
        return rows.flatten(0, 2)


class HeadScores(NamedTuple):
    """What is asked of ``n`` tokens; ``None`` is not wanted.

    Attributes:
        log_probs: ``[n, k]``, float32 or the input's own dtype if wider; differentiable.
        entropy: ``[n]``, likewise.
        top_log_probs, top_columns: ``[n, top_k]``, the largest first, of the whole vocabulary.
        largest, argmax: ``[n]``, each token's largest logit on this rank, and its column there.
    """

    log_probs: Tensor
    entropy: Tensor | None
    top_log_probs: Tensor | None
    top_columns: Tensor | None
    largest: Tensor | None = None
    argmax: Tensor | None = None


def reduce_scores(
    statistics: Statistics, columns: Tensor, top: Largest | None, vocabulary: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, HeadScores]:
    """The log-sum-exp ``[n]`` and scores, but for ``largest``. Two collectives; Megatron's loss takes three.

    Args:
        statistics: of all of this rank's ``vocabulary`` logits.
        columns: ``[n, k]``, the chosen ones, numbered as this rank's.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    largest = statistics.largest
    if group is not None:
        largest = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shift = statistics.largest - largest
    here = (columns >= 0) & (columns < vocabulary)
    rows = [
        (statistics.sum_exp * torch.exp(shift))[None],
        torch.where(here, statistics.column_logits - largest[:, None], 0.0).t(),
    ]
    if statistics.weighted is not None:
        shift_weighted(statistics.weighted, statistics.sum_exp, shift)
        rows.append(statistics.weighted[None])
    if top is not None:
        rows.append(top.rows(rank, ranks))
    sums = torch.cat(rows)
    if group is not None:
        dist.all_reduce(sums, group=group)
    parts = iter(sums.split([len(part) for part in rows]))
    sum_exp = next(parts)[0]
    log_sum = torch.log(sum_exp)
    log_probs = (next(parts) - log_sum).t().contiguous()
    entropy = log_sum - next(parts)[0] / sum_exp if statistics.weighted is not None else None
    top_log_probs = top_columns = None
    if top is not None:
        k = top.logits.shape[1]
        logits, of_ranks = next(parts).view(ranks, 2, k, -1).transpose(0, 1).flatten(1, 2)
        logits, of_these = logits.topk(k, dim=0)
        top_log_probs = (logits - largest - log_sum).t().contiguous()
        top_columns = of_ranks.gather(0, of_these).t().contiguous().to(torch.int64)
    return log_sum + largest, HeadScores(log_probs, entropy, top_log_probs, top_columns)

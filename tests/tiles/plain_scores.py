"""Scores by their formulas from whole logits: what tiled ones are compared with."""

from typing import NamedTuple

import torch
from torch import Tensor


class Plain(NamedTuple):
    log_probs: Tensor
    entropy: Tensor
    top_log_probs: Tensor
    top_columns: Tensor


def plain_scores(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 1,
) -> Plain:
    """Of columns ``[s, b, k]``; a column outside the vocabulary has the largest logit, as a constant, in its place."""
    logits = hidden @ weight.t() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_p = logits.log_softmax(dim=-1)
    inside = (columns >= 0) & (columns < logits.shape[-1])
    outside = logits.amax(-1, keepdim=True).detach() - logits.logsumexp(-1, keepdim=True)
    log_probs = torch.where(inside, log_p.gather(-1, columns.where(inside, 0)), outside)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top, top_columns = log_p.detach().topk(top_k, dim=-1)
    if mask is not None:
        log_probs, top, top_columns = (value * mask[..., None] for value in (log_probs, top, top_columns))
        entropy = entropy * mask
    return Plain(log_probs, entropy, top, top_columns)


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    columns: Tensor
    mask: Tensor
    of_log_probs: Tensor
    of_entropy: Tensor


def problem(tokens: tuple[int, int], vocabulary: int, hidden_size: int, k: int, seed: int) -> Problem:
    """Float64; some columns outside the vocabulary, some twice; half of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Problem(
        normal(*tokens, hidden_size).requires_grad_(),
        normal(vocabulary, hidden_size).requires_grad_(),
        torch.randint(-2, vocabulary + 2, (*tokens, k), generator=generator),
        torch.rand(tokens, generator=generator) > 0.5,
        normal(*tokens, k),
        normal(*tokens),
    )

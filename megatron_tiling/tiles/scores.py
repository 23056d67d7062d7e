"""What post-training asks of a language model: log-probabilities of tokens, entropies, top-k, without the logits.

``tiled_scores`` is for hidden states and a weight; ``resident/score_processor.py`` puts it into a Megatron model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.head import HeadLoop, check_tokens, head_scores
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.softmax import LogitScale


@dataclass(frozen=True)
class Scores:
    """Of each token's logits; all 0 where the mask is, and ``None`` where nothing was asked for.

    Args:
        log_probs: ``[s, b, k]``, or ``[s, b]`` for columns of that shape; float32, or the hidden states' own dtype if
            wider; differentiable.
        entropy: ``[s, b]``, likewise.
        top_log_probs, top_columns: ``[s, b, top_k]``, the largest first; not differentiable.
        mask: ``[s, b]``, as given.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    top_log_probs: Tensor | None = None
    top_columns: Tensor | None = None
    mask: Tensor | None = None

    def transposed(self) -> Scores:
        """``[s, b, ...]`` to ``[b, s, ...]`` and back."""
        turned = {name: None if value is None else value.transpose(0, 1) for name, value in vars(self).items()}
        return Scores(**turned)  # type: ignore[arg-type]


def tiled_scores(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int = 0,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    logits_in_fp32: bool = False,
    softcap: float | None = None,
    fuse_wgrad: bool = False,
    memory_mib: int = 272,
) -> Scores:
    """Scores of ``softcap * tanh(hidden @ weight.T / softcap) / temperature``, tile by tile.

    Args:
        hidden: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism.
        weight: ``[v, h]``, this rank's columns of the vocabulary.
        columns: ``[s, b]`` or ``[s, b, k]`` int64, of the whole vocabulary, the same on all ranks. The log-probability
            of one outside it is the largest logit less the log-sum-exp, and its gradient that of the log-sum-exp.
        temperature: divides logits.
        entropy: ask for entropies, in nats.
        top_k: ask for so many of the largest log-probabilities.
        mask: ``[s, b]`` bool; only these tokens are projected, the others cost nothing. Under sequence parallelism they
            are chosen after the gather.
        mask_count: how many they are; where it is given, nothing waits for the GPU.
        tp_group: ranks that share the vocabulary, as many columns each; all of them get the same values.
        sequence_parallel: ``hidden`` is this rank's part of the sequence.
        logits_in_fp32: logits are not rounded to the weight's dtype; takes three times their memory.
        softcap: bounds logits; ``None``: they have none.
        fuse_wgrad: add the weight gradient to ``weight.main_grad``.
        memory_mib: bound for what is held at once.

    Raises:
        ValueError: shapes that do not belong together, a ``top_k`` beyond the vocabulary, a temperature or softcap
            that is not positive, ``sequence_parallel`` or ``mask_count`` without what they need.
        RuntimeError: the mask has not ``mask_count`` tokens (on a GPU when it comes to it).
    """
    comm = None
    if tp_group is not None and tp_group.size() > 1:
        comm = ColumnComm(
            tp_group,
            sequence_parallel,
            not sequence_parallel,
            lambda shape, dtype: hidden.new_empty(shape, dtype=dtype),
        )
    elif sequence_parallel and tp_group is None:
        raise ValueError("sequence_parallel: needs the tp_group among whose ranks the sequence is divided")
    loop = HeadLoop(
        HeadTiles(memory_mib),
        None if comm is None else tp_group,
        comm,
        fuse_wgrad=fuse_wgrad,
        scale=LogitScale(softcap=softcap, temperature=temperature),
        logits_in_fp32=logits_in_fp32,
        entropy=entropy,
        top_k=top_k,
    )
    return scores_of(hidden, weight, columns, loop, mask, mask_count)


def scores_of(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    loop: HeadLoop,
    mask: Tensor | None = None,
    mask_count: int | None = None,
) -> Scores:
    """``tiled_scores`` with its options as a loop; see there."""
    tokens = columns.shape[: hidden.dim() - 1]
    check_tokens("columns", tokens, hidden, loop)
    if not 0 <= loop.top_k <= len(weight) * loop.ranks:
        raise ValueError(f"top_k {loop.top_k}: the vocabulary has {len(weight) * loop.ranks} columns")
    rows = None
    if mask is not None:
        check_tokens("mask values", mask.shape, hidden, loop)
        rows = _rows(mask.reshape(-1), mask_count)
    elif mask_count is not None:
        raise ValueError(f"mask_count {mask_count}: there is no mask")
    chosen = columns.reshape(tokens.numel(), columns.shape[len(tokens) :].numel())
    found = head_scores(hidden, weight, chosen if rows is None else chosen[rows], loop, rows)

    def whole(value: Tensor | None, *last: int) -> Tensor | None:
        if value is not None and rows is not None:
            value = value.new_zeros(tokens.numel(), *value.shape[1:]).index_copy(0, rows, value)
        return None if value is None else value.reshape(*tokens, *last)

    log_probs = whole(found.log_probs, *columns.shape[len(tokens) :])
    assert log_probs is not None
    top_log_probs, top_columns = (whole(value, loop.top_k) for value in (found.top_log_probs, found.top_columns))
    return Scores(log_probs, whole(found.entropy), top_log_probs, top_columns, mask)


def _rows(mask: Tensor, count: int | None) -> Tensor:
    """Where a mask is set."""
    mask = mask.bool()
    if count is None:
        return mask.nonzero().squeeze(1)
    torch._assert_async(mask.sum() == count, f"mask_count {count}: the mask has another number of tokens")
    return torch.nonzero_static(mask, size=count, fill_value=0).squeeze(1)


def tiled_kl(
    scores: Scores,
    teacher_log_probs: Tensor,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    rest: Literal["bucket", "ignore"] = "bucket",
) -> Tensor:
    """KL divergence of each token between a teacher and the student, over the teacher's top-k columns.

    Args:
        scores: the student's, of the columns ``[s, b, k]`` that the teacher chose, no column twice.
        teacher_log_probs: ``[s, b, k]``, of the same columns.
        direction: forward is KL(teacher || student), reverse KL(student || teacher).
        rest: what all other columns count as: one more, with the probability that is left, or nothing.

    Returns:
        ``[s, b]``, 0 where the scores' mask is; differentiable by the scores.

    Raises:
        ValueError: other shapes, or another direction or rest.
    """
    if scores.log_probs.dim() != 3:
        raise ValueError(f"the scores have shape {list(scores.log_probs.shape)}: must be [s, b, k]")
    if teacher_log_probs.shape != scores.log_probs.shape:
        shapes = f"{list(teacher_log_probs.shape)}, the scores {list(scores.log_probs.shape)}"
        raise ValueError(f"teacher_log_probs have shape {shapes}")
    if direction not in ("forward", "reverse") or rest not in ("bucket", "ignore"):
        raise ValueError(f"direction {direction}, rest {rest}: choose forward or reverse, and bucket or ignore")
    teacher, student = teacher_log_probs.to(scores.log_probs.dtype), scores.log_probs
    if rest == "bucket":
        teacher, student = (torch.cat([value, _log_of_rest(value)], dim=-1) for value in (teacher, student))
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    p = first.exp()
    divergence = torch.where(p > 0, p * (first - second), 0.0).sum(dim=-1)
    return divergence if scores.mask is None else torch.where(scores.mask.bool(), divergence, 0.0)


def _log_of_rest(log_probs: Tensor) -> Tensor:
    """Log of the probability that is left, at least the dtype's epsilon, of which its sum is uncertain anyway."""
    left = 1 - log_probs.exp().sum(dim=-1, keepdim=True)
    return left.clamp_min(torch.finfo(left.dtype).eps).log()

"""Linear layer and what is asked of its logits in one: log-probabilities, entropies, losses, without logits.

One autograd function makes the logits tile by tile, consumes each tile and drops it. The forward pass keeps a
log-sum-exp per token, and the last tile, or more of them; the backward pass makes each other tile again, turns it
into its gradient in place and multiplies it into both gradients. That is four GEMMs in all, less the kept tiles' share
of one; the dense form has three, but moves every logit through memory many times.

Depends on torch alone; ``softmax.py`` has what is done to a tile of logits, ``scores.py`` what users call.
The loss's semantics are those of ``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles import softmax
from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.device import has_kernels
from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.head_cut import HeadCut, HeadSizes, HeadTiles
from megatron_tiling.tiles.head_memory import InputGrad, LogitsBuffers
from megatron_tiling.tiles.head_reduce import HeadScores, Largest, reduce_scores
from megatron_tiling.tiles.softmax import LogitScale, Statistics, TokenGradients
from megatron_tiling.tiles.step_comm import steps_for
from megatron_tiling.tiles.stepped_linear import LinearSteps
from megatron_tiling.tiles.wgrad import WeightGrad


@dataclass(frozen=True)
class HeadLoop:
    """How ``head_scores`` and ``tiled_linear_cross_entropy`` run.

    Args:
        tiles: memory bound, tile sizes, and how many tiles of logits stay for the backward pass.
        group: ranks that share the vocabulary, as many columns each; ``None`` if this rank has all.
        comm: collectives of the input and its gradient.
        steps: under sequence parallelism the forward pass gathers its input behind the first tile's product, in steps
            of tokens, where that tile has all tokens; ``None``: before it.
        fuse_wgrad: add the weight gradient to ``weight.main_grad`` in place.
        scale: how products become logits.
        logits_in_fp32: products are not rounded to the weight's dtype.
        entropy: wanted too.
        top_k: how many of the largest log-probabilities are wanted too.
        keep_largest: each token's largest logit among this rank's columns, and its column, are wanted too.
    """

    tiles: HeadTiles = field(default_factory=HeadTiles)
    group: dist.ProcessGroup | None = None
    comm: ColumnComm | None = None
    steps: LinearSteps | None = None
    fuse_wgrad: bool = False
    scale: LogitScale = field(default_factory=LogitScale)
    logits_in_fp32: bool = False
    entropy: bool = False
    top_k: int = 0
    keep_largest: bool = False

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of logits whose operands have ``dtype``."""
        return _wide(dtype) if self.logits_in_fp32 else dtype


@dataclass(frozen=True)
class TokenLosses:
    """What ``tiled_linear_cross_entropy`` returns, each of the labels' shape.

    Args:
        loss: float32, or the logits' own dtype if wider; differentiable.
        largest, argmax: with ``keep_largest``, each token's largest logit on this rank, and its column there.
    """

    loss: Tensor
    largest: Tensor | None = None
    argmax: Tensor | None = None


def head_scores(
    hidden: Tensor, weight: Tensor, columns: Tensor, loop: HeadLoop, rows: Tensor | None = None
) -> HeadScores:
    """Log-probabilities of chosen columns of the vocabulary, and what else ``loop`` asks for, without the logits.

    Args:
        hidden: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism; any leading dimensions.
        weight: ``[v, h]``, this rank's columns of the vocabulary.
        columns: ``[n, k]`` int64, columns of the whole vocabulary. As in Megatron's loss, the log-probability of a
            column outside it is the largest logit less the log-sum-exp, and its gradient that of the log-sum-exp.
        loop: tiles, collectives and options.
        rows: ``[n]`` int64, which tokens of all ranks' ``hidden`` are meant, none of them twice; ``None`` is all.
    """
    if not torch.is_grad_enabled():  # which autograd functions are not told: the cut is for one pass then
        hidden, weight = hidden.detach(), weight.detach()
    return HeadScores(*_TiledHead.apply(hidden, weight, columns, rows, loop))


def tiled_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loop: HeadLoop) -> TokenLosses:
    """``vocab_parallel_cross_entropy(loop.scale(hidden @ weight.T), labels)`` without the logits.

    Args:
        hidden, weight, loop: as for ``head_scores``.
        labels: ``[s, b]`` int64, columns of the whole vocabulary. As in Megatron, the loss of a label outside
            it is the log-sum-exp less the largest logit, and its gradient that of the log-sum-exp.

    Raises:
        ValueError: labels of another shape than the hidden states.
    """
    check_tokens("labels", labels.shape, hidden, loop)
    scores = head_scores(hidden, weight, labels.reshape(-1, 1), loop)
    largest, argmax = (None if value is None else value.view_as(labels) for value in (scores.largest, scores.argmax))
    return TokenLosses(-scores.log_probs.view_as(labels), largest, argmax)


def check_tokens(name: str, shape: torch.Size, hidden: Tensor, loop: HeadLoop) -> None:
    """Refuse what is not of the shape of all ranks' tokens."""
    shards = 1 if loop.comm is None else loop.comm.shards
    expected = (hidden.shape[0] * shards, *hidden.shape[1:-1])
    if tuple(shape) != expected:
        raise ValueError(f"{name} have shape {list(shape)}, the hidden states {list(expected)} tokens")


class _TiledHead(torch.autograd.Function):
    """Tokens ``n``, vocabulary ``v``, hidden ``h``; a tile has ``n_t`` tokens and ``v_t`` columns.

    ========  ===============================  ==============================================================
    forward   x ``[n_t, h]``, W ``[v_t, h]``   z ``[n_t, v_t]`` = x W^T, dropped after its statistics
    scores    per token: max, sums, z[column]  log-probability z[column] - max - log(sum exp(z - max)), entropy
    remake    x, W                             z again, if it was dropped, overwritten by
    softmax   z, log-sum-exp, upstream         dz, see ``softmax.logits_to_gradient``
    dgrad     dz, W                            dx ``[n_t, h]`` += dz W, in float32
    wgrad     dz, x                            dW ``[v_t, h]`` = dz^T x, += from the second token tile on
    ========  ===============================  ==============================================================

    Collectives: x is gathered once in each pass under sequence parallelism: with ``steps`` behind the first GEMM, in
    the backward pass under the first dgrad GEMM if its tile was kept; the largest logits are reduced by one all-reduce,
    all else by another; dx is reduced once, under the last wgrad GEMM.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, columns: Tensor, rows: Tensor | None, loop: HeadLoop
    ) -> tuple[Tensor | None, ...]:
        ctx.loop = loop
        # The parameter itself carries main_grad, which saved tensors may lose.
        ctx.param = weight if ctx.needs_input_grad[1] else None
        sizes = _sizes(loop, hidden, weight, rows, ctx.needs_input_grad)
        cut = ctx.cut = loop.tiles.cut(sizes)
        steps = loop.steps if rows is None and len(cut.tokens) == 1 else None
        if steps is not None:
            count = steps_for(sizes.tokens, steps.steps, steps.least_tokens)
            steps = replace(steps, steps=count) if count > 1 else None
        x = _rows(_gather(hidden, loop, async_op=False)[0], rows) if steps is None else steps.memory(hidden)
        first_column = 0 if loop.group is None else loop.group.rank() * len(weight)
        columns = columns - first_column
        ctx.set_materialize_grads(False)
        wide = _wide(x.dtype)
        statistics = Statistics.of_no_logits(columns, wide, weighted=loop.entropy, argmax=loop.keep_largest)
        top = Largest(loop.top_k, loop.scale, statistics) if loop.top_k else None
        buffers = LogitsBuffers(x, cut, max(cut.kept, 1), loop.logits_dtype(x.dtype))
        update_statistics = softmax_for(x).update_statistics
        for index, (tokens, part) in enumerate(cut.tiles):
            if index == 0 and steps is not None:
                logits = buffers.make_first(x, weight[part], hidden, steps)
            else:
                logits = buffers.make(index, x[tokens], weight[part])
            update_statistics(logits, part.start, columns[tokens], loop.scale, statistics.of(tokens))
            if top is not None:
                top.add(tokens, logits, first_column + part.start)
        ctx.kept = buffers if cut.kept else None
        log_sum_exp, found = reduce_scores(statistics, columns, top, len(weight), loop.group)
        ctx.save_for_backward(hidden, weight, columns, rows, log_sum_exp, found.entropy)
        if statistics.argmax is not None:
            found = found._replace(largest=statistics.largest.to(x.dtype), argmax=statistics.argmax)
        ctx.mark_non_differentiable(*(value for value in found[2:] if value is not None))
        return tuple(found)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, of_columns: Tensor | None, of_entropy: Tensor | None, *unused: Tensor | None
    ) -> tuple[Any, ...]:
        hidden, weight, columns, rows, log_sum_exp, entropy = ctx.saved_tensors
        loop: HeadLoop = ctx.loop
        cut: HeadCut = ctx.cut
        needs_dgrad, needs_wgrad, *_ = ctx.needs_input_grad
        gathered, gathering = _gather(hidden, loop, async_op=rows is None)
        x = _rows(gathered, rows)
        if of_columns is None:
            of_columns = torch.zeros_like(columns, dtype=log_sum_exp.dtype)
        upstream = TokenGradients(log_sum_exp, of_columns, of_entropy, None if of_entropy is None else entropy)

        # A second pass over a retained graph finds gradients where the first found logits: it makes them all.
        buffers, ctx.kept = ctx.kept, None
        remade = len(cut.tiles) - (cut.kept if buffers is not None else 0)
        buffers = buffers or LogitsBuffers(x, cut, 1, loop.logits_dtype(x.dtype))
        gradient_buffer = buffers.of_gradients(x)
        logits_to_gradient = softmax_for(x).logits_to_gradient
        wgrad = WeightGrad(ctx.param, loop.fuse_wgrad) if needs_wgrad else None
        dgrad = InputGrad(gathered, rows, x, cut) if needs_dgrad else None
        for index, (tokens, part) in reversed(list(enumerate(cut.tiles))):
            if index < remade:
                _wait(gathering)
                logits = buffers.make(index, x[tokens], weight[part])
            else:
                logits = buffers.take(index, tokens, part)
            dz = logits if gradient_buffer is None else gradient_buffer[: len(logits), : logits.shape[1]]
            logits_to_gradient(logits, dz, part.start, columns[tokens], loop.scale, upstream.of(tokens))
            if dgrad is not None:
                dgrad.add(tokens, dz, weight[part], first=part is cut.columns[-1])
                if index > 0 and part is cut.columns[0]:
                    dgrad.round(tokens)
                elif index == 0 and loop.comm is not None:
                    dgrad.reduce(tokens, loop.comm)
            _wait(gathering)
            if wgrad is not None:
                wgrad.add(part, slice(None), dz, x[tokens], accumulate=tokens is not cut.tokens[-1])
        del dz, logits, buffers, gradient_buffer  # before the result of an input gradient that nothing waits for
        grad_hidden = None if dgrad is None else dgrad.finish(cut.tokens[0])
        return grad_hidden, None if wgrad is None else wgrad.result(), None, None, None


def _gather(hidden: Tensor, loop: HeadLoop, *, async_op: bool) -> tuple[Tensor, dist.Work | None]:
    """The hidden states of all ranks' tokens."""
    if loop.comm is not None and loop.comm.sequence_parallel:
        return loop.comm.gather(hidden, async_op=async_op)
    return hidden, None


def _rows(gathered: Tensor, rows: Tensor | None) -> Tensor:
    """``[..., h]`` -> ``[n, h]``."""
    return flat(gathered) if rows is None else flat(gathered).index_select(0, rows)


def _sizes(
    loop: HeadLoop, hidden: Tensor, weight: Tensor, rows: Tensor | None, needs_grad: tuple[bool, ...]
) -> HeadSizes:
    reduced_by = 0 if loop.comm is None else loop.comm.shards
    all_tokens = hidden.numel() // hidden.shape[-1] * max(reduced_by, 1)
    main_grad = getattr(weight, "main_grad", None) if loop.fuse_wgrad else None
    logits = loop.logits_dtype(weight.dtype)
    return HeadSizes(
        tokens=all_tokens if rows is None else len(rows),
        vocabulary=len(weight),
        hidden=weight.shape[1],
        element_bytes=weight.element_size(),
        logit_bytes=logits.itemsize + (0 if logits == weight.dtype else weight.element_size()),
        reduced_by=reduced_by,
        sums_wgrad=(weight if main_grad is None else main_grad).element_size() >= 4,
        dgrad=needs_grad[0],
        wgrad=needs_grad[1],
        chosen_from=0 if rows is None else all_tokens,
    )


def _wait(work: dist.Work | None) -> None:
    """May be called again."""
    if work is not None:
        work.wait()


def softmax_for(x: Tensor) -> ModuleType:
    """``tiles/softmax.py``, or its two functions as kernels for what this device and dtype multiply to."""
    if has_kernels(x):
        from megatron_tiling.tiles.kernels import softmax as kernels

        return kernels
    return softmax


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""Linear layer and vocabulary-parallel cross entropy in one: logits never exist whole.

One autograd function makes the logits tile by tile, consumes each tile and drops it. The forward pass keeps a
log-sum-exp per token, and the last tile, or more of them; the backward pass makes each other tile again, turns it
into its gradient in place and multiplies it into both gradients. That is four GEMMs in all, less the kept tiles' share
of one; the dense form has three, but moves every logit through memory many times.

Depends on torch alone; ``softmax.py`` has what is done to a tile of logits.
Semantics are those of ``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tiling.tiles import softmax
from megatron_tiling.tiles.comm import ColumnComm, flat
from megatron_tiling.tiles.gemm import gemm_into, scratch
from megatron_tiling.tiles.head_cut import HeadCut, HeadSizes, HeadTiles
from megatron_tiling.tiles.softmax import Statistics
from megatron_tiling.tiles.wgrad import WeightGrad


@dataclass(frozen=True)
class CrossEntropyLoop:
    """How ``tiled_linear_cross_entropy`` runs.

    Args:
        tiles: memory bound, tile sizes, and how many tiles of logits stay for the backward pass.
        group: ranks that share the vocabulary, as many columns each; ``None`` if this rank has all.
        comm: collectives of the input and its gradient.
        fuse_wgrad: add the weight gradient to ``weight.main_grad`` in place.
        scale: multiplies the logits.
        keep_largest: also return each token's largest logit among this rank's columns, and its column.
    """

    tiles: HeadTiles = field(default_factory=HeadTiles)
    group: dist.ProcessGroup | None = None
    comm: ColumnComm | None = None
    fuse_wgrad: bool = False
    scale: float = 1.0
    keep_largest: bool = False

    def first_column(self, vocabulary: int) -> int:
        """Where this rank's ``vocabulary`` columns begin in the whole."""
        return 0 if self.group is None else self.group.rank() * vocabulary


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


def tiled_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loop: CrossEntropyLoop) -> TokenLosses:
    """``vocab_parallel_cross_entropy(scale * hidden @ weight.T, labels)`` without the logits.

    Args:
        hidden: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism; any leading dimensions.
        weight: ``[v, h]``, this rank's columns of the vocabulary.
        labels: ``[s, b]`` int64, columns of the whole vocabulary. As in Megatron, the loss of a label outside
            it is the log-sum-exp less the largest logit, and its gradient that of the log-sum-exp.
        loop: tiles, collectives and options.

    Raises:
        ValueError: labels of another shape than the hidden states.
    """
    shards = loop.group.size() if loop.comm is not None and loop.comm.sequence_parallel and loop.group else 1
    expected = (hidden.shape[0] * shards, *hidden.shape[1:-1])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels have shape {list(labels.shape)}, the hidden states {list(expected)} tokens")
    return TokenLosses(*_TiledLinearCrossEntropy.apply(hidden, weight, labels, loop))


class _TiledLinearCrossEntropy(torch.autograd.Function):
    """Tokens ``n``, vocabulary ``v``, hidden ``h``; a tile has ``n_t`` tokens and ``v_t`` columns.

    ========  ===============================  ==============================================================
    forward   x ``[n_t, h]``, W ``[v_t, h]``   z ``[n_t, v_t]`` = x W^T, dropped after its statistics
    loss      per token: max, sum, z[label]    log(sum exp(z - max)) - (z[label] - max), float32
    remake    x, W                             z again, overwritten by
    softmax   z, log-sum-exp, dloss            dz = (softmax(z) - onehot(label)) * dloss
    dgrad     dz, W                            dx ``[n_t, h]`` += dz W, in float32
    wgrad     dz, x                            dW ``[v_t, h]`` = dz^T x, += from the second token tile on
    ========  ===============================  ==============================================================

    Collectives: x is gathered once in each pass under sequence parallelism; the largest logits are reduced by
    one all-reduce, sums and label logits by another; dx is reduced once, under the last wgrad GEMM.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loop: CrossEntropyLoop
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.loop = loop
        # The parameter itself carries main_grad, which saved tensors may lose.
        ctx.param = weight if ctx.needs_input_grad[1] else None
        gathered = hidden
        if loop.comm is not None and loop.comm.sequence_parallel:
            gathered, _ = loop.comm.gather(hidden)
        x = flat(gathered)
        cut = ctx.cut = loop.tiles.cut(_sizes(loop, x, weight, ctx.needs_input_grad))
        local_labels = labels.reshape(-1) - loop.first_column(len(weight))
        statistics = Statistics.of_no_logits(local_labels, _wide(x.dtype), argmax=loop.keep_largest)
        update_statistics = softmax_for(x).update_statistics
        buffers = _LogitsBuffers(x, cut, max(cut.kept, 1))
        for index, (tokens, columns) in enumerate(cut.tiles):
            logits = buffers.make(index, x[tokens], weight[columns])
            update_statistics(logits, columns.start, local_labels[tokens], loop.scale, statistics.of(tokens))
        ctx.kept = buffers if cut.kept else None
        loss, log_sum_exp = _loss(statistics, local_labels, len(weight), loop.group)
        ctx.save_for_backward(hidden, weight, local_labels, log_sum_exp)
        if statistics.argmax is None:
            return loss.view_as(labels), None, None
        largest = statistics.largest.to(x.dtype).view_as(labels)
        argmax = statistics.argmax.view_as(labels)
        ctx.mark_non_differentiable(largest, argmax)
        return loss.view_as(labels), largest, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, local_labels, log_sum_exp = ctx.saved_tensors
        loop: CrossEntropyLoop = ctx.loop
        needs_dgrad, needs_wgrad, *_ = ctx.needs_input_grad
        gathered, gathering = hidden, None
        if loop.comm is not None and loop.comm.sequence_parallel:
            gathered, gathering = loop.comm.gather(hidden, async_op=True)
        x = flat(gathered)
        cut: HeadCut = ctx.cut
        grad_loss = grad_loss.reshape(-1).to(log_sum_exp.dtype)

        # A second pass over a retained graph finds gradients where the first found logits: it makes them all.
        buffers, ctx.kept = ctx.kept, None
        remade = len(cut.tiles) - (cut.kept if buffers is not None else 0)
        buffers = buffers or _LogitsBuffers(x, cut, 1)
        logits_to_gradient = softmax_for(x).logits_to_gradient
        wgrad = WeightGrad(ctx.param, loop.fuse_wgrad) if needs_wgrad else None
        dgrad = _InputGrad(x, cut) if needs_dgrad else None
        reduction = None
        for index, (tokens, columns) in reversed(list(enumerate(cut.tiles))):
            if index < remade:
                _wait(gathering)
                dz = buffers.make(index, x[tokens], weight[columns])
            else:
                dz = buffers.take(index, tokens, columns)
            per_token = local_labels[tokens], log_sum_exp[tokens], grad_loss[tokens]
            logits_to_gradient(dz, columns.start, *per_token, loop.scale)
            if dgrad is not None:
                dgrad.add(tokens, dz, weight[columns], first=columns is cut.columns[-1])
                if index > 0 and columns is cut.columns[0]:
                    dgrad.round(tokens)
                elif index == 0 and loop.comm is not None:
                    dgrad.round(tokens)
                    reduction = loop.comm.reduce(dgrad.result().view(gathered.shape))
            _wait(gathering)
            if wgrad is not None:
                wgrad.add(columns, slice(None), dz, x[tokens], accumulate=tokens is not cut.tokens[-1])
        del dz, buffers  # before the result of an input gradient that nothing waits for
        grad_hidden = None
        if reduction is not None:
            grad_hidden, work = reduction
            _wait(work)
        elif dgrad is not None:
            dgrad.round(cut.tokens[0])
            grad_hidden = dgrad.result().view(gathered.shape)
        return grad_hidden, None if wgrad is None else wgrad.result(), None, None


class _LogitsBuffers:
    """Memory for tiles of logits: the last ones have one each, all before share the first of these.

    Rows begin at multiples of 128 bytes. The backward pass goes from the last tile to the first, and drops what it
    needs no more.
    """

    def __init__(self, x: Tensor, cut: HeadCut, buffers: int) -> None:
        per_line = 128 // x.element_size()
        width = -(-cut.width // per_line) * per_line
        self._memory = [scratch(x, cut.height, width) for _ in range(buffers)]
        self._shared = len(cut.tiles) - buffers

    def make(self, index: int, x: Tensor, weight: Tensor) -> Tensor:
        """``[n_t, h]`` and ``[v_t, h]`` -> the logits ``[n_t, v_t]`` of a tile."""
        logits = self._memory[max(index - self._shared, 0)][: len(x), : len(weight)]
        gemm_into(logits, x, weight.t(), accumulate=False)
        return logits

    def take(self, index: int, tokens: slice, columns: slice) -> Tensor:
        """The logits that ``make`` has left of a tile, before those of earlier ones are taken or made."""
        del self._memory[index - self._shared + 1 :]
        return self._memory[-1][: tokens.stop - tokens.start, : columns.stop - columns.start]


class _InputGrad:
    """The input gradient ``[n, h]``; a narrow one is summed in float32 and rounded once a token tile."""

    def __init__(self, x: Tensor, cut: HeadCut) -> None:
        self._x = x
        self._result: Tensor | None = None
        self._sum: Tensor | None = None
        if x.element_size() < 4 and len(cut.columns) > 1:
            self._sum = x.new_empty(cut.height, x.shape[1], dtype=torch.float32)

    def add(self, tokens: slice, dz: Tensor, weight: Tensor, *, first: bool) -> None:
        """dgrad GEMM of one tile: ``[n_t, v_t]`` and ``[v_t, h]`` -> ``[n_t, h]``; all but the first add."""
        total = self.result()[tokens] if self._sum is None else self._sum[: len(dz)]
        gemm_into(total, dz, weight, accumulate=not first)

    def round(self, tokens: slice) -> None:
        """Take over the sum of a token tile, once all its vocabulary tiles are added."""
        if self._sum is not None:
            self.result()[tokens] = self._sum[: tokens.stop - tokens.start]

    def result(self) -> Tensor:
        """``[n, h]``, made at the first call: a single token tile can wait for the logits' memory."""
        if self._result is None:
            self._result = self._x.new_empty(self._x.shape)
        return self._result


def _loss(
    statistics: Statistics, local_labels: Tensor, vocabulary: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp ``[n]`` over the whole vocabulary; two collectives, three in Megatron."""
    has_label = (local_labels >= 0) & (local_labels < vocabulary)
    largest = statistics.largest
    if group is not None:
        largest = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(
        [
            statistics.sum_exp * torch.exp(statistics.largest - largest),
            torch.where(has_label, statistics.label_logit - largest, 0.0),
        ]
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    log_sum = torch.log(sums[0])
    return log_sum - sums[1], log_sum + largest


def _sizes(loop: CrossEntropyLoop, x: Tensor, weight: Tensor, needs_grad: tuple[bool, ...]) -> HeadSizes:
    reduced_by = 0
    if loop.comm is not None:
        reduced_by = loop.comm.group.size() if loop.comm.sequence_parallel else 1
    grad = getattr(weight, "main_grad", weight) if loop.fuse_wgrad else weight
    element_bytes = weight.element_size()
    sums_wgrad = grad.element_size() >= 4
    return HeadSizes(
        len(x), len(weight), x.shape[1], element_bytes, element_bytes, reduced_by, sums_wgrad, *needs_grad[:2]
    )


def _wait(work: dist.Work | None) -> None:
    """May be called again."""
    if work is not None:
        work.wait()


def softmax_for(logits: Tensor) -> ModuleType:
    """``tiles/softmax.py``, or its two functions as kernels for tiles of this device and dtype."""
    if logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from megatron_tiling.tiles.kernels import softmax as kernels

        return kernels
    return softmax


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Triton kernels on one tile of logits: softmax statistics of its tokens, and its gradient in place.

The same two functions as in ``tiles/softmax.py``, for logits of at most 32 bits on a GPU, in float32. A
program handles a token's row or a block of it. Both kernels are bound by memory bandwidth: the first reads each
logit once, the second reads and writes it once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tiling.tiles.softmax import Statistics

STATISTICS_BLOCK, STATISTICS_WARPS = 4096, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8


def update_statistics(logits: Tensor, first_column: int, labels: Tensor, scale: float, statistics: Statistics) -> None:
    """See ``tiles/softmax.py``."""
    tokens, columns = logits.shape
    if tokens == 0:
        return
    written = statistics.largest, statistics.sum_exp, statistics.label_logit, statistics.argmax
    _check_written(logits, *written)
    block = min(STATISTICS_BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):
        _update_statistics[(tokens,)](
            logits, logits.stride(0), columns, first_column, labels.contiguous(), scale,
            *written,
            BLOCKS=triton.cdiv(columns, block), BLOCK=block, num_warps=STATISTICS_WARPS,
        )  # fmt: skip


def logits_to_gradient(
    logits: Tensor, first_column: int, labels: Tensor, log_sum_exp: Tensor, grad_loss: Tensor, scale: float
) -> None:
    """See ``tiles/softmax.py``."""
    tokens, columns = logits.shape
    if tokens == 0:
        return
    _check_written(logits)
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
    # Autograd hands over gradients of any stride: of `losses.sum()` one element for all tokens.
    with torch.cuda.device_of(logits):
        _logits_to_gradient[(tokens, triton.cdiv(columns, block))](
            logits, logits.stride(0), columns, first_column,
            labels.contiguous(), log_sum_exp.contiguous(), grad_loss.contiguous(), scale,
            BLOCK=block, num_warps=GRADIENT_WARPS,
        )  # fmt: skip


def _check_written(logits: Tensor, *statistics: Tensor | None) -> None:
    """What the kernels write lies as they suppose: rows of logits dense, statistics dense."""
    if (logits.shape[1] > 1 and logits.stride(1) != 1) or not all(
        tensor is None or tensor.is_contiguous() for tensor in statistics
    ):
        raise ValueError("a tile of logits needs dense rows, and the statistics of its tokens must be contiguous")


@triton.jit
def _update_statistics(
    logits_ptr, row_stride, columns, first_column, labels_ptr, scale,
    largest_ptr, sum_exp_ptr, label_logit_ptr, argmax_ptr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * row_stride
    largest = tl.load(largest_ptr + token)
    sum_exp = tl.load(sum_exp_ptr + token)
    if argmax_ptr is not None:
        argmax = tl.load(argmax_ptr + token)
    for index in range(BLOCKS):  # of a known number: Triton's interpreter takes no other since numpy 2.5
        column = index * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        logit = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32) * scale
        logit = tl.where(inside, logit, float("-inf"))
        block_largest = tl.max(logit, axis=0)
        if argmax_ptr is not None:
            first = tl.min(tl.where(logit == block_largest, column, columns), axis=0)
            argmax = tl.where(block_largest > largest, (first_column + first).to(tl.int64), argmax)
        new_largest = tl.maximum(largest, block_largest)
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing but -inf so far: -inf less 0
        sum_exp = sum_exp * tl.exp(largest - shift) + tl.sum(tl.exp(logit - shift), axis=0)
        largest = new_largest
    tl.store(largest_ptr + token, largest)
    tl.store(sum_exp_ptr + token, sum_exp)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + token, argmax)
    label = tl.load(labels_ptr + token) - first_column
    if (label >= 0) & (label < columns):
        tl.store(label_logit_ptr + token, tl.load(row_ptr + label).to(tl.float32) * scale)


@triton.jit
def _logits_to_gradient(
    logits_ptr, row_stride, columns, first_column, labels_ptr, log_sum_exp_ptr, grad_loss_ptr, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    pointers = logits_ptr + token * row_stride + column
    logit = tl.load(pointers, mask=inside).to(tl.float32) * scale
    label = tl.load(labels_ptr + token) - first_column
    factor = tl.load(grad_loss_ptr + token) * scale
    gradient = tl.exp(logit - tl.load(log_sum_exp_ptr + token))
    gradient = tl.where(column == label, gradient - 1.0, gradient) * factor
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=inside)

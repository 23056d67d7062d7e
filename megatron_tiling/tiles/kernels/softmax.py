"""Triton kernels on one tile of logits: softmax statistics of its tokens, and its gradient in place.

The same two functions as in ``tiles/softmax.py``, for logits of at most 32 bits on a GPU, in float32. A
program handles a token's row or a block of it. Both kernels are bound by memory bandwidth: the first reads each
logit once, the second reads and writes it once.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_tiling.tiles.device import blocks, launch, next_power_of_2
from megatron_tiling.tiles.softmax import LogitScale, Statistics, TokenGradients

STATISTICS_BLOCK, STATISTICS_WARPS = 4096, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4


def update_statistics(
    products: Tensor, first_column: int, columns: Tensor, scale: LogitScale, statistics: Statistics
) -> None:
    """See ``tiles/softmax.py``."""
    tokens, width = products.shape
    if tokens == 0:
        return
    written = (
        statistics.largest, statistics.sum_exp, statistics.column_logits, statistics.weighted, statistics.argmax,
    )  # fmt: skip
    _check_written(products, *written)
    block = min(STATISTICS_BLOCK, next_power_of_2(width))
    chosen = columns.shape[1]
    launch(
        _update_statistics, (tokens,), products,
        products, products.stride(0), width, first_column, columns.contiguous(), *_factors(scale), *written,
        CHOSEN=chosen, CHOSEN_BLOCK=next_power_of_2(max(chosen, 1)), CAPPED=scale.softcap is not None,
        BLOCKS=width // block, REST=width % block > 0, BLOCK=block, num_warps=STATISTICS_WARPS,
    )  # fmt: skip


def logits_to_gradient(
    products: Tensor, out: Tensor, first_column: int, columns: Tensor, scale: LogitScale, gradients: TokenGradients
) -> None:
    """See ``tiles/softmax.py``."""
    tokens, width = products.shape
    if tokens == 0:
        return
    _check_written(products)
    _check_written(out)
    # Autograd hands over gradients of any stride: of `losses.sum()` one element for all tokens.
    log_sum_exp, of_columns, of_entropy, entropy = (
        None if value is None else value.contiguous() for value in gradients
    )
    block = min(GRADIENT_BLOCK, next_power_of_2(width))
    launch(
        _logits_to_gradient, (tokens, blocks(width, block)), products,
        products, products.stride(0), out, out.stride(0), width, first_column, columns.contiguous(),
        *_factors(scale), scale.slope, log_sum_exp, of_columns, of_entropy, entropy,
        CHOSEN=columns.shape[1], CAPPED=scale.softcap is not None, BLOCK=block, num_warps=GRADIENT_WARPS,
    )  # fmt: skip


def _factors(scale: LogitScale) -> tuple[float, float]:
    """What a product is multiplied by, before the tanh if there is one, and after it."""
    if scale.softcap is None:
        return scale.slope, 1.0
    return scale.scale / scale.softcap, scale.softcap / scale.temperature


def _check_written(tile: Tensor, *statistics: Tensor | None) -> None:
    """What the kernels write lies as they suppose: rows of logits dense, statistics dense."""
    if (tile.shape[1] > 1 and tile.stride(1) != 1) or not all(
        tensor is None or tensor.is_contiguous() for tensor in statistics
    ):
        raise ValueError("a tile of logits needs dense rows, and the statistics of its tokens must be contiguous")


@triton.jit
def _logit(product, inner, outer, CAPPED: tl.constexpr):
    logit = product.to(tl.float32) * inner
    if CAPPED:
        logit = (2.0 * tl.sigmoid(2.0 * logit) - 1.0) * outer  # tanh
    return logit


@triton.jit
def _take_block(
    row_ptr, start, width, first_column, inner, outer, largest, sum_exp, weighted, argmax,
    WEIGHTED: tl.constexpr, ARGMAX: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's statistics with a block of its row; masks cost time, so that only what ends a row has them."""
    column = start + tl.arange(0, BLOCK)
    if MASKED:
        inside = column < width
        logit = _logit(tl.load(row_ptr + column, mask=inside, other=0.0), inner, outer, CAPPED)
        logit = tl.where(inside, logit, float("-inf"))
    else:
        logit = _logit(tl.load(row_ptr + column), inner, outer, CAPPED)
    block_largest = tl.max(logit, axis=0)
    if ARGMAX:
        first = tl.min(tl.where(logit == block_largest, column, width), axis=0)
        argmax = tl.where(block_largest > largest, (first_column + first).to(tl.int64), argmax)
    new_largest = tl.maximum(largest, block_largest)
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing but -inf so far: -inf less 0
    shifted = logit - shift
    exp = tl.exp(shifted)
    decay = tl.exp(largest - shift)
    if WEIGHTED:
        before = tl.where(sum_exp > 0, weighted + sum_exp * (largest - shift), 0.0)
        weighted = before * decay + tl.sum(exp * tl.maximum(shifted, -200.0), axis=0)  # of -inf, exp is 0 too
    return new_largest, sum_exp * decay + tl.sum(exp, axis=0), weighted, argmax


@triton.jit
def _update_statistics(
    products_ptr, row_stride, width, first_column, columns_ptr, inner, outer,
    largest_ptr, sum_exp_ptr, column_logits_ptr, weighted_ptr, argmax_ptr,
    CHOSEN: tl.constexpr, CHOSEN_BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    BLOCKS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row_ptr = products_ptr + token * row_stride
    largest = tl.load(largest_ptr + token)
    sum_exp = tl.load(sum_exp_ptr + token)
    weighted, argmax = 0.0, tl.zeros([], tl.int64)
    if weighted_ptr is not None:
        weighted = tl.load(weighted_ptr + token)
    if argmax_ptr is not None:
        argmax = tl.load(argmax_ptr + token)
    for index in range(BLOCKS):  # of a known number: Triton's interpreter takes no other since numpy 2.5
        largest, sum_exp, weighted, argmax = _take_block(
            row_ptr, index * BLOCK, width, first_column, inner, outer, largest, sum_exp, weighted, argmax,
            weighted_ptr is not None, argmax_ptr is not None, CAPPED, False, BLOCK,
        )  # fmt: skip
    if REST:
        largest, sum_exp, weighted, argmax = _take_block(
            row_ptr, BLOCKS * BLOCK, width, first_column, inner, outer, largest, sum_exp, weighted, argmax,
            weighted_ptr is not None, argmax_ptr is not None, CAPPED, True, BLOCK,
        )  # fmt: skip
    tl.store(largest_ptr + token, largest)
    tl.store(sum_exp_ptr + token, sum_exp)
    if weighted_ptr is not None:
        tl.store(weighted_ptr + token, weighted)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + token, argmax)
    slot = tl.arange(0, CHOSEN_BLOCK)
    at = tl.load(columns_ptr + token * CHOSEN + slot, mask=slot < CHOSEN, other=0) - first_column
    here = (slot < CHOSEN) & (at >= 0) & (at < width)
    chosen = _logit(tl.load(row_ptr + at, mask=here, other=0.0), inner, outer, CAPPED)
    tl.store(column_logits_ptr + token * CHOSEN + slot, chosen, mask=here)


@triton.jit
def _logits_to_gradient(
    products_ptr, row_stride, out_ptr, out_stride, width, first_column, columns_ptr, inner, outer, slope,
    log_sum_exp_ptr, of_columns_ptr, of_entropy_ptr, entropy_ptr,
    CHOSEN: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    logit = _logit(tl.load(products_ptr + token * row_stride + column, mask=inside, other=0.0), inner, outer, CAPPED)
    log_p = logit - tl.load(log_sum_exp_ptr + token)
    p = tl.exp(log_p)
    total = 0.0
    chosen = tl.zeros([BLOCK], tl.float32)
    for index in range(CHOSEN):
        at = tl.load(columns_ptr + token * CHOSEN + index) - first_column
        of_column = tl.load(of_columns_ptr + token * CHOSEN + index)
        total += of_column
        chosen = tl.where(column == at, chosen + of_column, chosen)
    if of_entropy_ptr is not None:
        pull = tl.load(of_entropy_ptr + token) * (log_p + tl.load(entropy_ptr + token))
        gradient = chosen - tl.where(p > 0, p * (total + pull), 0.0)
    else:
        gradient = chosen - p * total
    if CAPPED:
        gradient *= 1.0 - (logit / outer) * (logit / outer)
    tl.store(out_ptr + token * out_stride + column, (gradient * slope).to(out_ptr.dtype.element_ty), mask=inside)

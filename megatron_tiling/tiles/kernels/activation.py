"""Triton kernels of the activations in the tile loop: one pass over memory, forward and backward.

A kernel reads its operands where the GEMMs left them (any row stride, any width) and the backward kernel writes over
what it has read: the pre-activation becomes its gradient, the activation's gradient becomes the activation. Arithmetic
is float32. Imported only where tensors are on a GPU.
"""

# mypy: allow-untyped-defs

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tiling.tiles.device import blocks, launch, next_power_of_2

WARPS = 4
FP8_BLOCK = 64, 64  # written transposed, and so square
ALIGNMENT = 16  # numbers that are multiples of this make 16-byte accesses


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    """The function ``x * s(x)`` and its derivative, where ``s`` is a sigmoid, a normal distribution or a step."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        slope = s + x * s * (1.0 - s)
    elif KIND == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        slope = s + 1.702 * x * s * (1.0 - s)
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u), with the constants of Megatron's fused functions
        square = x * x
        s = tl.sigmoid(2.0 * 0.79788456 * x * (1.0 + 0.044715 * square))
        slope = s + 2.0 * x * s * (1.0 - s) * (0.79788456 + 0.1070322243 * square)
    elif KIND == "gelu":
        s = 0.5 + 0.5 * tl.erf(0.70710678118654752 * x)
        slope = s + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif KIND == "relu":
        s = tl.where(x > 0, 1.0, 0.0)
        slope = s
    else:  # squared_relu
        s = tl.maximum(x, 0.0)
        slope = 2.0 * s
    return x * s, slope


@triton.jit
def _largest(values, mask):
    return tl.max(tl.where(mask, tl.abs(values.to(tl.float32)), 0.0))


@triton.jit
def _forward_kernel(
    parts, bias, scale, out, amax, rows, bias_half_stride, out_stride, clamp, linear_offset,
    KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr,
    AMAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    for index in tl.static_range(len(parts)):
        if tl.program_id(1) == index:
            pre, start, columns, half_stride, row_stride = parts[index]
            column_blocks = tl.cdiv(columns, COLUMNS)
            row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
            column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
            x = tl.load(pre + at, mask, 0.0).to(tl.float32)
            if BIAS:
                x += tl.load(bias + start + column, column < columns, 0.0).to(tl.float32)[None, :]
            if CLAMP:
                x = tl.minimum(x, clamp)
            y, _ = _value_and_slope(x, KIND)
            if GATED:
                up = tl.load(pre + half_stride + at, mask, 0.0).to(tl.float32)
                if BIAS:
                    up_bias = bias + bias_half_stride + start
                    up += tl.load(up_bias + column, column < columns, 0.0).to(tl.float32)[None, :]
                if CLAMP:
                    up = tl.minimum(tl.maximum(up, -clamp), clamp)
                y *= up + linear_offset
            if SCALE:
                y *= tl.load(scale + row, row < rows, 0.0).to(tl.float32)[:, None]
            y = y.to(out.dtype.element_ty)
            tl.store(out + start + row.to(tl.int64)[:, None] * out_stride + column[None, :], y, mask)
            if AMAX:
                tl.atomic_max(amax, _largest(y, mask), sem="relaxed")


@triton.jit
def _backward_kernel(
    pre, bias, scale, grad, bias_sums, scale_sums, amax, fp8, fp8_scale,
    rows, columns, half_stride, row_stride, bias_half_stride, grad_stride, fp8_stride, clamp, linear_offset,
    KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr,
    BIAS_SUMS: tl.constexpr, SCALE_SUMS: tl.constexpr, AMAX: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(columns, COLUMNS)
    row_block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    grad_at = grad + row.to(tl.int64)[:, None] * grad_stride + column[None, :]
    x = tl.load(pre + at, mask, 0.0).to(tl.float32)
    dy = tl.load(grad_at, mask, 0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre + half_stride + at, mask, 0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + column, column < columns, 0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + bias_half_stride + column, column < columns, 0.0).to(tl.float32)[None, :]
    if CLAMP:
        x_inside = x <= clamp
        x = tl.minimum(x, clamp)
    y, slope = _value_and_slope(x, KIND)
    if GATED:
        if CLAMP:
            up_inside = (up >= -clamp) & (up <= clamp)
            up = tl.minimum(tl.maximum(up, -clamp), clamp)
        up += linear_offset
    unscaled_dy = dy
    if SCALE:
        token_scale = tl.load(scale + row, row < rows, 0.0).to(tl.float32)[:, None]
        dy *= token_scale
    dx = dy * slope
    if GATED:
        dup = dy * y
        dx *= up
        y *= up
        if CLAMP:
            dup = tl.where(up_inside, dup, 0.0)
        tl.store(pre + half_stride + at, dup.to(pre.dtype.element_ty), mask)
    if CLAMP:
        dx = tl.where(x_inside, dx, 0.0)
    tl.store(pre + at, dx.to(pre.dtype.element_ty), mask)
    if AMAX:
        largest = _largest(dx.to(pre.dtype.element_ty), mask)
        if GATED:
            largest = tl.maximum(largest, _largest(dup.to(pre.dtype.element_ty), mask))
        tl.atomic_max(amax, largest, sem="relaxed")
    if SCALE_SUMS:
        sums = tl.sum(tl.where(mask, unscaled_dy * y, 0.0), axis=1)
        tl.store(scale_sums + column_block.to(tl.int64) * rows + row, sums, row < rows)
    if SCALE:
        y *= token_scale
    y = y.to(grad.dtype.element_ty)
    if FP8 > 0:  # the largest value of the format
        scaled = tl.trans(y.to(tl.float32) * tl.load(fp8_scale))
        scaled = tl.clamp(scaled, -FP8, FP8, propagate_nan=tl.PropagateNan.ALL)
        fp8_at = fp8 + column.to(tl.int64)[:, None] * fp8_stride + row[None, :]
        tl.store(fp8_at, scaled.to(fp8.dtype.element_ty), (column < columns)[:, None] & (row < rows)[None, :])
    else:
        tl.store(grad_at, y, mask)
    if BIAS_SUMS:
        halves: tl.constexpr = 2 if GATED else 1
        sums_at = bias_sums + row_block.to(tl.int64) * columns * halves + column
        tl.store(sums_at, tl.sum(tl.where(mask, dx, 0.0), axis=0), column < columns)
        if GATED:
            tl.store(sums_at + columns, tl.sum(tl.where(mask, dup, 0.0), axis=0), column < columns)


def activate(
    parts: Sequence[Tensor], bias: Tensor | None, scale: Tensor | None, out: Tensor,
    *, kind: str, clamp: float | None, linear_offset: float, amax: Tensor | None = None,
) -> None:  # fmt: skip
    """``out [n, f] = scale * activation(pre [halves, n, f] + bias [halves, f])``; ``amax [1]`` rises to its largest.

    ``pre`` comes in parts ``[halves, n, f_i]`` of neighbouring features: one launch for all of them.
    """
    rows = out.shape[0]
    if not rows:
        return
    bias, scale = _dense(bias), _dense(scale)
    bias_half_stride, (out_stride, dense) = 0 if bias is None else bias.stride(0), out.stride()
    described, start, widest, numbers = [], 0, 0, [bias_half_stride, out_stride]
    for pre in parts:
        columns, (half_stride, row_stride, stride) = pre.shape[2], pre.stride()
        _check_rows(columns, stride, dense)
        described.append((pre, start, columns, half_stride, row_stride))
        numbers += start, columns, half_stride, row_stride
        start, widest = start + columns, max(widest, columns)
    block_rows, block_columns = _block(widest, *numbers)
    launch(
        _forward_kernel,
        (blocks(rows, block_rows) * blocks(widest, block_columns), len(described)), out,
        tuple(described), bias, scale, out, amax, rows, bias_half_stride, out_stride,
        0.0 if clamp is None else clamp, linear_offset,
        KIND=kind, CLAMP=clamp is not None, AMAX=amax is not None,
        GATED=parts[0].shape[0] == 2, BIAS=bias is not None, SCALE=scale is not None,
        ROWS=block_rows, COLUMNS=block_columns, num_warps=WARPS,
    )  # fmt: skip


def activate_backward(
    pre: Tensor, bias: Tensor | None, scale: Tensor | None, grad: Tensor,
    *, bias_grad: bool, scale_grad: bool, kind: str, clamp: float | None, linear_offset: float,
    amax: Tensor | None = None, fp8: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """``pre`` becomes its gradient, to whose largest value ``amax [1]`` rises, ``grad`` the activation.

    With ``fp8``, ``[f, n]`` and a scale ``[1]``, the activation goes there, scaled and transposed.
    Returns the gradients of bias and scale, in float32.
    """
    halves, rows, columns = pre.shape
    bias, scale = _dense(bias), _dense(scale)
    (half_stride, row_stride, stride), (grad_stride, dense) = pre.stride(), grad.stride()
    _check_rows(columns, stride, dense)
    numbers = columns, half_stride, row_stride, 0 if bias is None else bias.stride(0), grad_stride
    block_rows, block_columns = FP8_BLOCK if fp8 else _block(*numbers, limit=512 if bias_grad else 2048)
    fp8_out, fp8_scale = fp8 or (None, None)
    largest, fp8_stride = (0.0, 0) if fp8_out is None else (torch.finfo(fp8_out.dtype).max, fp8_out.stride(0))
    row_blocks, column_blocks = blocks(rows, block_rows), blocks(columns, block_columns)
    bias_sums = pre.new_empty(row_blocks, halves, columns, dtype=torch.float32) if bias_grad else None
    scale_sums = pre.new_empty(column_blocks, rows, dtype=torch.float32) if scale_grad else None
    if rows:
        launch(
            _backward_kernel, (row_blocks * column_blocks,), grad,
            pre, bias, scale, grad, bias_sums, scale_sums, amax, fp8_out, fp8_scale,
            rows, *numbers, fp8_stride, 0.0 if clamp is None else clamp, linear_offset,
            KIND=kind, CLAMP=clamp is not None, BIAS_SUMS=bias_grad, SCALE_SUMS=scale_grad,
            AMAX=amax is not None, FP8=largest, GATED=halves == 2, BIAS=bias is not None, SCALE=scale is not None,
            ROWS=block_rows, COLUMNS=block_columns, num_warps=WARPS,
        )  # fmt: skip
    return (
        None if bias_sums is None else bias_sums.sum(dim=0),
        None if scale_sums is None else scale_sums.sum(dim=0),
    )


def _dense(vectors: Tensor | None) -> Tensor | None:
    """What a kernel only reads may come in any layout: expanded, strided, transposed."""
    return None if vectors is None else vectors.contiguous()


def _check_rows(columns: int, *strides: int) -> None:
    if columns > 1 and set(strides) != {1}:
        raise ValueError("pre-activations and activations need dense rows")


def _block(columns: int, *others: int, limit: int = 2048) -> tuple[int, int]:
    """Rows and columns of a block of ``columns``, where the ``others`` say too what is aligned: the fastest on an H100.

    Long runs of a row suit the memory, more rows shorten the sums over them. Without alignment every element is an
    access of its own, and as many of them as fit in 16 bytes are too many for the registers.
    """
    elements, width = (4096, 2048) if math.gcd(columns, *others) % ALIGNMENT == 0 else (2048, 1024)
    width = min(width, limit, next_power_of_2(columns))
    return elements // width, width

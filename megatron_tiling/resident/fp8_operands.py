"""FP8 operands of the tiles of an MLP: TransformerEngine's quantizers and quantized tensors, cut and joined.

A tensor that is quantized in parts, or again, gets the scale that it has or had as a whole: a weight in all
micro-batches of an optimizer step, an activation in the backward pass. Scales per tensor (delayed and current scaling)
are one number, scales per block (blockwise scaling) come from the values alone. Blocks are 128 wide, and so cuts are
multiples of that. Layouts are Hopper's, where an operand has its rows, or its columns, transposed, or copies of both.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

BLOCK = 128
Operand = Any  # Float8TensorStorage or Float8BlockwiseQTensorStorage, of which mypy sees nothing
Quantizer = Any


def quantized(quantizer: Quantizer, tensor: Tensor, *, rowwise: bool = False, columnwise: bool = False) -> Operand:
    """A tensor ``[n, k]`` in FP8, with its rows ``[n, k]``, its columns ``[k, n]``, or both."""
    blocks = isinstance(quantizer, Float8BlockQuantizer)
    quantizer.internal = True  # as TransformerEngine's layers set it, and the usage, before each use
    quantizer.set_usage(rowwise=rowwise or not blocks, columnwise=columnwise)  # columns alone are for blocks only
    operand = quantizer(tensor)
    if columnwise and not rowwise:
        operand.update_usage(rowwise_usage=False, columnwise_usage=True)
    return operand


def inverse_scale(operand: Operand) -> Tensor | None:
    """``[1]``; ``None`` where blocks have scales of their own."""
    return operand._scale_inv if isinstance(operand, Float8TensorStorage) else None


def same_again(quantizer: Quantizer, inverses: Sequence[Tensor | None]) -> Quantizer:
    """One that quantizes a tensor, or parts of it, like before, and notes nothing.

    Args:
        quantizer: the first one.
        inverses: the inverse scales of what it made of the tensor, or of its parts, of which the largest is taken.
    """
    known = [inverse for inverse in inverses if inverse is not None]
    if not known:
        return quantizer
    inverse = torch.stack(known).amax(dim=0)
    return Float8Quantizer(inverse.reciprocal(), torch.zeros_like(inverse), quantizer.dtype)


def rows_of(operand: Operand, rows: slice) -> Operand:
    """Some rows, without a copy, of an operand that has its rows."""
    if isinstance(operand, Float8TensorStorage):
        return _per_tensor(operand, data=operand._data[rows])
    if operand._is_2D_scaled:
        scales = operand._rowwise_scale_inv[rows.start // BLOCK : -(-rows.stop // BLOCK)]
    else:
        scales = operand._rowwise_scale_inv[:, rows].contiguous()
    return _per_block(operand, operand._rowwise_data[rows], scales)


def columns_of(weight: Operand, columns: slice) -> Operand:
    """Some columns, as rows ``[n, k_i]`` of their own, of a weight that has its rows: a copy."""
    if isinstance(weight, Float8TensorStorage):
        return _per_tensor(weight, data=_copied(weight._data, columns))
    scales = weight._rowwise_scale_inv[:, columns.start // BLOCK : -(-columns.stop // BLOCK)]
    scales = F.pad(scales, (0, -scales.shape[1] % 4)).contiguous()  # GEMMs want four at a time
    return _per_block(weight, _copied(weight._rowwise_data, columns), scales)


def joined(parts: Sequence[Operand]) -> Operand:
    """``[n, k_i]`` of one scale, or of blocks, that have their columns -> ``[n, sum of k_i]`` that has its columns."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Float8TensorStorage):
        return _per_tensor(first, data_transpose=torch.cat([part._transpose for part in parts]))
    columns = torch.cat([part._columnwise_data for part in parts])
    return _per_block(first, None, None, columns, torch.cat([part._columnwise_scale_inv for part in parts], dim=1))


class WeightCopies:
    """One weight in FP8, the same in all micro-batches of an optimizer step.

    Args:
        quantizer: the layer's, for its weight.
        hold: keep the copies over these micro-batches; else only the scale is kept.
    """

    def __init__(self, quantizer: Quantizer, hold: bool) -> None:
        self._quantizer, self._hold = quantizer, hold
        self._is_first = True
        self._held: dict[tuple[str, int], Operand] = {}

    def whole(self, weight: Tensor) -> Operand:
        """``[n, k]`` with its rows: first of all in a step. A weight that is FP8 itself is not quantized."""
        if isinstance(weight, QuantizedTensorStorage):
            return rows_of(weight, slice(0, weight.shape[0]))
        operand = self._held.get(("whole", 0))
        if operand is None:
            operand = quantized(self._quantizer, weight, rowwise=True)
            if self._is_first:
                self._quantizer, self._is_first = same_again(self._quantizer, [inverse_scale(operand)]), False
            self._keep("whole", 0, operand)
        return operand

    def rows(self, weight: Tensor, rows: slice) -> Operand:
        """``[n_i, k]`` with its rows and its columns."""
        operand = self._held.get(("rows", rows.start))
        if operand is None:
            if isinstance(weight, QuantizedTensorStorage):
                operand = rows_of(weight, rows)
            elif self._hold:
                operand = rows_of(self.whole(weight), rows)
            else:
                operand = quantized(self._quantizer, weight[rows], rowwise=True)
            operand.update_usage(rowwise_usage=True, columnwise_usage=True)
            self._keep("rows", rows.start, operand)
        return operand

    def columns(self, whole: Operand, columns: slice) -> Operand:
        """``[n, k_i]`` with its columns, of the ``whole``."""
        operand = self._held.get(("columns", columns.start))
        if operand is None:
            operand = columns_of(whole, columns)
            operand.update_usage(rowwise_usage=True, columnwise_usage=True)
            operand.update_usage(rowwise_usage=False, columnwise_usage=True)
            self._keep("columns", columns.start, operand)
        return operand

    def _keep(self, kind: str, start: int, operand: Operand) -> None:
        if self._hold:
            self._held[kind, start] = operand


def _copied(data: Tensor, columns: slice) -> Tensor:
    """Eight bytes at a time: cuts are multiples of 16."""
    return data.view(torch.int64)[:, columns.start // 8 : columns.stop // 8].contiguous().view(data.dtype)


def _per_tensor(like: Operand, data: Tensor | None = None, data_transpose: Tensor | None = None) -> Operand:
    return Float8TensorStorage(
        data=data,
        data_transpose=data_transpose,
        fp8_scale_inv=like._scale_inv,
        fp8_dtype=like._fp8_dtype,
        fake_dtype=like._dtype,
    )


def _per_block(
    like: Operand,
    rows: Tensor | None,
    row_scales: Tensor | None,
    columns: Tensor | None = None,
    column_scales: Tensor | None = None,
) -> Operand:
    return Float8BlockwiseQTensorStorage(
        rows,
        row_scales,
        columns,
        column_scales,
        like._fp8_dtype,
        like._quantizer,
        like._is_2D_scaled,
        fake_dtype=like._dtype,
    )

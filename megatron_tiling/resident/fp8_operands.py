"""FP8 operands of the tiles of an MLP: TransformerEngine's quantizers and quantized tensors, cut and joined.

A tensor that is quantized in parts, or again, gets the scale that it has or had as a whole: a weight in all
micro-batches of an optimizer step, an activation in the backward pass. Scales per tensor (delayed and current scaling)
are one number, scales per block (blockwise scaling) come from the values alone. Blocks are 128 wide, and so cuts are
multiples of that. Layouts are Hopper's, where an operand has its rows, or its columns, transposed, or copies of both.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.optimizers import multi_tensor_applier
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from megatron_tiling.tiles.cast import cast

BLOCK = 128
Operand = Any  # Float8TensorStorage or Float8BlockwiseQTensorStorage, of which mypy sees nothing
Quantizer = Any


def quantized(
    quantizer: Quantizer, tensor: Tensor, *, rowwise: bool = False, columnwise: bool = False, amax: Tensor | None = None
) -> Operand:
    """A tensor ``[n, k]`` in FP8, with its rows ``[n, k]``, its columns ``[k, n]``, or both.

    Args:
        quantizer: TransformerEngine's.
        tensor: in high precision.
        rowwise, columnwise: what the products to come want.
        amax: of the tensor, ``[1]``, where ``wants_amax``; else it is read once more for it.
    """
    if amax is not None:
        quantizer = _with_scale_of(quantizer, amax)
    _use(quantizer, rowwise, columnwise)
    operand = quantizer(tensor)
    if columnwise and not rowwise:
        operand.update_usage(rowwise_usage=False, columnwise_usage=True)
    return operand


def _use(quantizer: Quantizer, rowwise: bool, columnwise: bool) -> None:
    blocks = isinstance(quantizer, Float8BlockQuantizer)
    quantizer.internal = True  # as TransformerEngine's layers set it, and the usage, before each use
    quantizer.set_usage(rowwise=rowwise or not blocks, columnwise=columnwise)  # columns alone are for blocks only


def split_quantized(
    quantizers: Sequence[Quantizer], tensor: Tensor, sizes: Sequence[int], *, rowwise: bool, columnwise: bool
) -> list[Operand]:
    """``quantized``, of so many rows of a tensor by each quantizer."""
    for quantizer in quantizers:
        _use(quantizer, rowwise, columnwise)
    operands: list[Operand] = tex.split_quantize(tensor, list(sizes), list(quantizers))
    for operand in operands if columnwise and not rowwise else ():
        operand.update_usage(rowwise_usage=False, columnwise_usage=True)
    return operands


def wants_amax(quantizer: Quantizer) -> bool:
    """Whether a tensor's largest absolute value, if known, saves ``quantized`` a pass over it."""
    return isinstance(quantizer, Float8CurrentScalingQuantizer)


def inverse_scale(operand: Operand) -> Tensor | None:
    """``[1]``; ``None`` where blocks have scales of their own."""
    return operand._scale_inv if isinstance(operand, Float8TensorStorage) else None


def same_again(quantizer: Quantizer, inverses: Sequence[Tensor | None]) -> Quantizer:
    """One that quantizes parts of a tensor like before, and notes nothing.

    Args:
        quantizer: the first one.
        inverses: the inverse scales of what it made of these parts, of which the largest is taken.
    """
    known = [inverse for inverse in inverses if inverse is not None]
    return _with_scale(quantizer, torch.stack(known).amax(dim=0).reciprocal()) if known else quantizer


def knows_scale(quantizer: Quantizer) -> bool:
    """Whether one scale, known before, is that of all that is quantized."""
    return isinstance(quantizer, Float8Quantizer)


def known_inverse_scale(quantizer: Quantizer) -> Tensor | None:
    """``[1]``, of a quantizer that ``knows_scale``."""
    return quantizer.scale.reciprocal().view(1) if knows_scale(quantizer) else None


def all_same_again(quantizers: Sequence[Quantizer]) -> list[Quantizer]:
    """Those that quantize all of the same tensors again, which they have now, and note nothing."""
    if not knows_scale(quantizers[0]):
        return list(quantizers)  # scales come from the values
    scales = torch.cat([quantizer.scale.view(1) for quantizer in quantizers])
    notes = torch.empty_like(scales)
    return [
        Float8Quantizer(scale, note, quantizer.dtype)
        for quantizer, scale, note in zip(quantizers, scales.split(1), notes.split(1), strict=True)
    ]


def columns_to_fill(
    quantizer: Quantizer, inverse: Tensor, tokens: int, features: int
) -> tuple[Operand, tuple[Tensor, Tensor]]:
    """``[n, k]`` of a known scale, with its columns; these ``[k, n]``, still to be written, and the scale ``[1]``."""
    columns = torch.empty(features, tokens, dtype=TE_DType_To_Torch[quantizer.dtype], device=quantizer.scale.device)
    operand = Float8TensorStorage(
        data=None,
        data_transpose=columns.view(torch.uint8),
        fp8_scale_inv=inverse,
        fp8_dtype=quantizer.dtype,
    )
    return operand, (columns, quantizer.scale)


def rows_of(operand: Operand, rows: slice) -> Operand:
    """Some rows, without a copy, of an operand that has its rows."""
    if isinstance(operand, Float8TensorStorage):
        return _per_tensor(operand, data=operand._data[rows])
    return _per_block(operand, operand._rowwise_data[rows], _scales(operand, operand._rowwise_scale_inv, rows))


def columns_of(operand: Operand, columns: slice) -> Operand:
    """Some columns, without a copy, of an operand that has its columns."""
    if isinstance(operand, Float8TensorStorage):
        return _per_tensor(operand, data_transpose=operand._transpose[columns])
    scales = _scales(operand, operand._columnwise_scale_inv, columns)
    return _per_block(operand, None, None, operand._columnwise_data[columns], scales)


def joined(parts: Sequence[Operand], *, rowwise: bool = False) -> Operand:
    """Parts of one scale, or of blocks: their columns side by side, or their rows below one another."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def together(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=dim)

    if isinstance(first, Float8TensorStorage):
        name, argument = ("_data", "data") if rowwise else ("_transpose", "data_transpose")
        return _per_tensor(first, **{argument: together(name)})
    name, dim = "_rowwise" if rowwise else "_columnwise", 0 if first._is_2D_scaled else 1
    operands = together(f"{name}_data"), together(f"{name}_scale_inv", dim)
    return _per_block(first, *operands) if rowwise else _per_block(first, None, None, *operands)


class WeightCopies:
    """One weight in FP8, the same in all micro-batches of an optimizer step.

    Args:
        quantizer: the layer's, for its weight.
        hold: keep the copies over these micro-batches; else only the scale is kept.
    """

    def __init__(self, quantizer: Quantizer, hold: bool) -> None:
        self._quantizer, self._hold = quantizer, hold
        self._is_first = True
        self._inverse: Tensor | None = None  # of the scale, if there is one
        self._held: dict[tuple[slice, ...], Operand] = {}

    def rows(
        self, weight: Tensor, ranges: Sequence[slice], *, rowwise: bool = True, columnwise: bool = False
    ) -> Operand:
        """Ranges of rows of ``weight [o, k]``, one below the other, as ``[n, k]`` with its rows, its columns, or both.

        The first call of a step notes the weight's largest value, as TransformerEngine would. A weight that is FP8
        itself is not quantized; several ranges of it are copied.
        """
        operand = self._held.get(tuple(ranges))
        if operand is None:
            operand = self._made(weight, ranges, rowwise or self._hold, columnwise)
            if self._hold:
                self._held[tuple(ranges)] = operand
        elif columnwise:
            operand.update_usage(rowwise_usage=True, columnwise_usage=True)
        return operand

    def makes_columns(self, weight: Tensor) -> bool:
        """Whether some of a weight's columns can be made without the others, and are not held anyway."""
        return not self._hold and not isinstance(weight, Float8BlockwiseQTensorStorage)  # whose scales are padded

    def columns(self, weight: Tensor, part: slice) -> Operand:
        """Some columns of ``weight [o, k]``, as ``[o, n]`` with its columns, of a weight that ``makes_columns`` of."""
        self.note(weight)
        if self._inverse is not None:
            return self._cast([weight[:, part]], self._inverse, rowwise=False, columnwise=True)
        if isinstance(weight, QuantizedTensorStorage):
            operand = _per_tensor(weight, data=weight._data[:, part].contiguous())
        else:
            operand = quantized(self._quantizer, weight[:, part].contiguous(), rowwise=True)
        return _with_columns(operand, rowwise=False)

    def _made(self, weight: Tensor, ranges: Sequence[slice], rowwise: bool, columnwise: bool) -> Operand:
        self.note(weight)
        if isinstance(weight, QuantizedTensorStorage):
            operand = joined([rows_of(weight, rows) for rows in ranges], rowwise=True)
        elif self._inverse is not None:
            return self._cast([weight[rows] for rows in ranges], self._inverse, rowwise, columnwise)
        else:
            operand = self._in_blocks(weight, ranges)
        return _with_columns(operand, rowwise) if columnwise else operand

    def note(self, weight: Tensor) -> None:
        """What the first call of a step does, for a weight that may not be used in it."""
        if self._is_first and not isinstance(weight, QuantizedTensorStorage):
            self._quantizer, self._is_first = _same_for_parts(self._quantizer, weight), False
            self._inverse = known_inverse_scale(self._quantizer)

    def _cast(self, parts: Sequence[Tensor], inverse: Tensor, rowwise: bool, columnwise: bool) -> Operand:
        first, dtype = parts[0], self._quantizer.dtype
        count, width, fp8 = sum(part.shape[0] for part in parts), first.shape[1], TE_DType_To_Torch[dtype]
        rows = first.new_empty(count, width, dtype=fp8) if rowwise else None
        columns = first.new_empty(width, count, dtype=fp8) if columnwise else None
        cast(parts, self._quantizer.scale, rows, columns)
        return Float8TensorStorage(
            data=None if rows is None else rows.view(torch.uint8),
            data_transpose=None if columns is None else columns.view(torch.uint8),
            fp8_scale_inv=inverse,
            fp8_dtype=dtype,
            fake_dtype=first.dtype,
        )

    def _in_blocks(self, weight: Tensor, ranges: Sequence[slice]) -> Operand:
        quantizer = self._quantizer
        _use(quantizer, rowwise=True, columnwise=False)
        sizes = [rows.stop - rows.start for rows in ranges]
        operand = quantizer.make_empty([sum(sizes), weight.shape[1]], dtype=weight.dtype, device=weight.device)
        start = 0
        for rows, size in zip(ranges, sizes, strict=True):
            tex.quantize(weight[rows], quantizer, rows_of(operand, slice(start, start + size)), None)
            start += size
        return operand


def _with_columns(operand: Operand, rowwise: bool) -> Operand:
    """An operand that has its rows, with its columns, made from them; without its rows unless ``rowwise``."""
    operand.update_usage(rowwise_usage=True, columnwise_usage=True)
    if not rowwise:
        operand.update_usage(rowwise_usage=False, columnwise_usage=True)
    return operand


def _same_for_parts(quantizer: Quantizer, weight: Tensor) -> Quantizer:
    """One that quantizes parts of a weight like the whole, and notes nothing; the first one notes the whole."""
    if isinstance(quantizer, Float8BlockQuantizer):
        return quantizer
    amax = torch.zeros(1, dtype=torch.float32, device=weight.device)
    tex.compute_amax(weight, amax)
    if wants_amax(quantizer):
        return _with_scale_of(quantizer, amax)
    quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view_as(quantizer.amax)))
    return _with_scale(quantizer, quantizer.scale.clone())


def _with_scale_of(quantizer: Quantizer, amax: Tensor) -> Quantizer:
    """Current scaling of a tensor whose ``amax [1]`` is known."""
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    largest = torch.finfo(TE_DType_To_Torch[quantizer.dtype]).max
    overflow = torch.empty(1, dtype=torch.int32, device=amax.device)  # wanted, and not used
    options = largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon
    multi_tensor_applier(tex.multi_tensor_compute_scale_and_scale_inv, overflow, [[amax], [scale], [inverse]], *options)
    return _with_scale(quantizer, scale)


def _with_scale(quantizer: Quantizer, scale: Tensor) -> Quantizer:
    return Float8Quantizer(scale, torch.empty_like(scale), quantizer.dtype)


def _scales(operand: Operand, scales: Tensor, rows: slice) -> Tensor:
    """Those of some rows of one of an operand's two layouts."""
    if operand._is_2D_scaled:
        return scales[rows.start // BLOCK : -(-rows.stop // BLOCK)]
    return scales[:, rows].contiguous()


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

"""A Triton kernel that casts parts of a matrix to FP8, by one scale: in one launch, its rows, its columns, or both.

TransformerEngine's kernels take one contiguous tensor: gate's and up's rows of a weight were two launches, their
columns a third. Imported only where tensors are on a GPU.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tiling.tiles.device import blocks, launch

WARPS = 4
BLOCK = 64


@triton.jit
def _cast_kernel(
    parts, stride, scale, into_rows, into_columns, all_rows, columns,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for index in tl.static_range(len(parts)):
        if tl.program_id(1) == index:
            source, start, rows = parts[index]
            column_blocks = tl.cdiv(columns, BLOCK)
            row = tl.program_id(0) // column_blocks * BLOCK + tl.arange(0, BLOCK)
            column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            x = tl.load(source + row.to(tl.int64)[:, None] * stride + column[None, :], mask, 0.0).to(tl.float32)
            x = tl.clamp(x * tl.load(scale), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
            row += start
            if ROWS:
                at = into_rows + row.to(tl.int64)[:, None] * columns + column[None, :]
                tl.store(at, x.to(into_rows.dtype.element_ty), mask)
            if COLUMNS:
                at = into_columns + column.to(tl.int64)[:, None] * all_rows + row[None, :]
                tl.store(at, tl.trans(x).to(into_columns.dtype.element_ty), tl.trans(mask))


def cast(parts: Sequence[Tensor], scale: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """``scale [1]`` times parts ``[n_i, k]``, below one another: ``rows [n, k]``, ``columns [k, n]``.

    Raises:
        ValueError: parts whose rows are not dense, or lie apart by different strides.
    """
    described, start, stride = [], 0, parts[0].stride(0)
    if any(part.stride() != (stride, 1) for part in parts):
        raise ValueError("parts to be cast need dense rows, and one row stride")
    for part in parts:
        described.append((part, start, part.shape[0]))
        start += part.shape[0]
    width, most = parts[0].shape[1], max(part.shape[0] for part in parts)
    out = rows if columns is None else columns
    assert out is not None
    launch(
        _cast_kernel, (blocks(most, BLOCK) * blocks(width, BLOCK), len(described)), out,
        tuple(described), stride, scale, rows, columns, start, width,
        LARGEST=torch.finfo(out.dtype).max, ROWS=rows is not None, COLUMNS=columns is not None, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip

"""Casts to FP8 by a scale that is known. Depends on torch alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tiling.tiles.device import on_gpu


def cast(parts: Sequence[Tensor], scale: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Parts of a matrix, one below the other, in FP8, as its rows, its columns, or both.

    Args:
        parts: ``[n_i, k]``, each of dense rows, and all of one row stride.
        scale: ``[1]``, float32. What is beyond FP8 after it becomes the largest value there is.
        rows: ``[n, k]`` in FP8, contiguous, which is written.
        columns: ``[k, n]``, the same of the columns.
    """
    if on_gpu(scale):
        from megatron_tiling.tiles.kernels.cast import cast as kernel

        kernel(parts, scale, rows, columns)
        return
    values = torch.cat([part.detach() for part in parts]).float() * scale
    for into, values_of in ((rows, values), (columns, values.t())):
        if into is not None:
            largest = torch.finfo(into.dtype).max
            into.copy_(values_of.clamp(-largest, largest))

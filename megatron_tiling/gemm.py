"""Matrix products that write into, or add to, a view of an existing tensor: no copies, no temporaries."""

import torch
from torch import Tensor


def gemm_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """``out = a @ b`` or ``out += a @ b``, in place.

    Args:
        out: ``[m, n]``, any row stride; the dtype of ``a`` and ``b``, or float32 for narrower operands.
        a, b: ``[m, k]`` and ``[k, n]``, possibly transposed views.
        accumulate: add to what ``out`` holds. ``False`` does not read it.
    """
    if out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the CPU has no product of one dtype into another
        gemm_into(out, a.to(out.dtype), b.to(out.dtype), accumulate=accumulate)

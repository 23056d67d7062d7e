"""A Triton kernel that adds up what ranks gave, in one pass over memory. Imported only where tensors are on a GPU.

torch's sum over a first dimension of a few reaches about half of the bandwidth, for it shares out the few.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from megatron_tiling.tiles.device import blocks, launch

WARPS = 4
BLOCK = 2048


@triton.jit
def _add_kernel(pieces, out, size, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(pieces + at, mask, 0.0).to(tl.float32)
    piece = pieces + at
    for _ in tl.static_range(1, RANKS):
        piece += size
        total += tl.load(piece, mask, 0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def add(pieces: Tensor, out: Tensor) -> None:
    """Contiguous ``[ranks, ...]`` -> contiguous ``[...]``: in float32, from the first rank on."""
    size = out.numel()
    if size:
        ranks = pieces.shape[0]
        grid = (blocks(size, BLOCK),)
        launch(_add_kernel, grid, out, pieces, out, size, RANKS=ranks, BLOCK=BLOCK, num_warps=WARPS)

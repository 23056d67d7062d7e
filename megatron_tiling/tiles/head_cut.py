"""How the LM head is cut: which tokens and which vocabulary columns make one tile of logits, and which tiles stay.

Pure Python. A tile ``[tokens, columns]`` of logits is the largest tensor of the head's loop. The last tile of the
forward pass stays in that memory, and the backward pass begins with it: its logits are not made again. Beside it, the
backward pass sums the input gradient ``[tokens, hidden]`` over vocabulary tiles in float32. All of it keeps within a
memory bound; of the cuts that do, the one of least time is taken.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import ceil
from typing import Literal, NamedTuple

from megatron_tiling.config import DEFAULT_HEAD_MEMORY_MIB
from megatron_tiling.tiles.grid import partition_uniform

MIB = 2**20
#: Long tiles begin at multiples of the widest tile of cuBLAS's kernels, shorter ones where its fast kernels can.
ALIGNMENT, ALIGNMENT_OF_SHORT = 256, 16
LEAST_COLUMNS = 4096
TOKEN_TILES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: What the parts of a loop cost, in operations of its GEMMs: a tile (four of them end, each with a part of the GPU
#: idle), and a byte of the weight gradient that is read or written once more. Sums of the input gradient cost nothing.
#: Fitted to times of benchmarks/head_cuts.py on an H100; most are given to 5 %, if tiles have 2048 tokens or more.
OPERATIONS_PER_TILE, OPERATIONS_PER_BYTE = 80e9, 130


class HeadSizes(NamedTuple):
    """What is to be cut.

    Attributes:
        tokens, vocabulary, hidden: of this rank's logits, and of the input's features.
        element_bytes, logit_bytes: of weight and input, and of a logit with its gradient.
        reduced_by: among how many ranks the input gradient is reduced while there are logits still; 0 if it is not,
            1 if each rank gets all of it.
        sums_wgrad: whether the weight gradient can be summed over token tiles; one narrower than float32 loses
            precision.
        dgrad, wgrad: which gradients there are; without any there is no backward pass, and no tile stays for it.
        chosen_from: of how many tokens these were chosen; 0 if they are all.
    """

    tokens: int
    vocabulary: int
    hidden: int
    element_bytes: int = 2
    logit_bytes: int = 2
    reduced_by: int = 0
    sums_wgrad: bool = True
    dgrad: bool = True
    wgrad: bool = True
    chosen_from: int = 0


class HeadCut(NamedTuple):
    """Ranges of tokens and of vocabulary columns, each pair of them a tile; the last ``kept`` stay."""

    tokens: list[slice]
    columns: list[slice]
    kept: int

    @property
    def tiles(self) -> list[tuple[slice, slice]]:
        """In the order of the forward pass; the backward pass takes them from the end."""
        return list(product(self.tokens, self.columns))

    @property
    def height(self) -> int:
        return max(part.stop - part.start for part in self.tokens)

    @property
    def width(self) -> int:
        return max(part.stop - part.start for part in self.columns)


@dataclass(frozen=True)
class HeadTiles:
    """What a user asks for: a memory bound, and what is fixed by hand; no tile is larger than what there is.

    Args:
        memory_mib: bound for all that the backward pass holds at once; ``None`` is the default, beyond which there
            may be tiles that stay because ``keep`` says so.
        tokens: tokens of a tile; ``None`` chooses.
        vocabulary_tiles: how many over this rank's vocabulary; ``None`` chooses.
        keep: how many tiles stay from the forward to the backward pass, within ``memory_mib`` where that is given;
            ``None``: as many as the bound has room for.

    Raises:
        ValueError: a bound that is not a whole number of at least 1.
    """

    memory_mib: int | None = None
    tokens: int | None = None
    vocabulary_tiles: int | None = None
    keep: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        if self.memory_mib is not None and (self.memory_mib % 1 or self.memory_mib < 1):
            raise ValueError(f"memory_mib {self.memory_mib}: must be a whole number of at least 1")

    def cut(self, sizes: HeadSizes) -> HeadCut:
        """The tiles of both passes.

        >>> cut = HeadTiles().cut(HeadSizes(8192, 128256, 4096))
        >>> len(cut.tokens), len(cut.columns), cut.columns[-1], cut.kept
        (1, 5, slice(98048, 128256, None), 1)
        """
        return _cut(self, sizes)


@lru_cache
def _cut(tiles: HeadTiles, sizes: HeadSizes) -> HeadCut:
    bound = (tiles.memory_mib or DEFAULT_HEAD_MEMORY_MIB) * MIB
    if tiles.keep == "all" and tiles.memory_mib is None:
        bound = 2**62
    if tiles.tokens is not None:
        heights = [tiles.tokens]
    elif sizes.sums_wgrad or not sizes.wgrad:
        heights = [_aligned(ceil(sizes.tokens / parts)) for parts in TOKEN_TILES]
        whole_rows = (bound - _beside_logits(sizes, 1, bound, several=False)) // (sizes.vocabulary * sizes.logit_bytes)
        if whole_rows >= ALIGNMENT:
            heights.append(whole_rows // ALIGNMENT * ALIGNMENT)
    else:
        heights = [sizes.tokens]
    cuts = []
    for height in heights:
        height = max(1, min(height, sizes.tokens))
        token_parts = _ranges(sizes.tokens, height)
        if tiles.vocabulary_tiles is not None:
            column_parts = _slices(partition_aligned(sizes.vocabulary, min(tiles.vocabulary_tiles, sizes.vocabulary)))
        else:
            column_parts = _ranges(sizes.vocabulary, _widest(sizes, height, bound))
        cut = HeadCut(token_parts, column_parts, 0)
        beside = _beside_logits(sizes, cut.height, bound, several=len(column_parts) > 1)
        tile = cut.height * cut.width * sizes.logit_bytes
        kept = _kept(tiles, cut, bound - beside, tile) if sizes.dgrad or sizes.wgrad else 0
        at_end = _beside_logits(sizes, cut.height, bound, several=len(column_parts) > 1, waits=False)
        cuts.append((cut._replace(kept=kept), max(beside + tile, at_end)))
    fitting = [(_time(cut, sizes), index) for index, (cut, memory) in enumerate(cuts) if memory <= bound]
    least = min(fitting or [(memory, index) for index, (_, memory) in enumerate(cuts)])
    cut = cuts[least[1]][0]
    if tiles.vocabulary_tiles is None and len(cut.tokens) == 1 and sizes.dgrad and sizes.wgrad:
        cut = cut._replace(columns=_evened(cut.columns, cut.kept))
    return cut


def _kept(tiles: HeadTiles, cut: HeadCut, room: int, tile_bytes: int) -> int:
    """One tile always can stay: its memory is there anyway."""
    asked = len(cut.tiles) if tiles.keep in (None, "all") else min(int(tiles.keep), len(cut.tiles))
    if tiles.keep is not None and tiles.memory_mib is None:
        return asked
    return min(asked, max(1, room // max(tile_bytes, 1)))


def _beside_logits(sizes: HeadSizes, height: int, bound: int, *, several: bool, waits: bool = True) -> int:
    """Bytes that there are with logits: the input gradient's sum over vocabulary tiles, and what has all tokens.

    Chosen rows and the result have all tokens, and are there whatever the cut: half of the bound is the logits' anyway.
    The result of a single token tile ``waits`` for the logits' memory, and then is there beside its sum, in whose
    memory it is reduced over ranks; not that of chosen rows.
    """
    token_bytes = sizes.hidden * sizes.element_bytes
    rows = token_bytes * sizes.tokens if sizes.chosen_from else 0
    summed = several and sizes.element_bytes < 4
    total = height * (4 * sizes.hidden if summed else token_bytes) if summed or sizes.chosen_from else 0
    result = token_bytes * (sizes.chosen_from or sizes.tokens)
    if total and height == sizes.tokens and not (sizes.reduced_by and sizes.chosen_from):
        result = 0 if waits else result // max(sizes.reduced_by, 1)
    elif sizes.reduced_by > 1:
        result += result // sizes.reduced_by
    return min(rows + result, bound // 2) + total if sizes.dgrad else min(rows, bound // 2)


def _widest(sizes: HeadSizes, height: int, bound: int) -> int:
    """Columns of the widest tile within the bound."""
    row_bytes = height * sizes.logit_bytes
    if sizes.vocabulary * row_bytes + _beside_logits(sizes, height, bound, several=False) <= bound:
        return sizes.vocabulary
    columns = (bound - _beside_logits(sizes, height, bound, several=True)) // row_bytes
    return min(max(columns, LEAST_COLUMNS) // ALIGNMENT * ALIGNMENT, sizes.vocabulary)


def _time(cut: HeadCut, sizes: HeadSizes) -> float:
    """What depends on the cut, in operations: logits made again, tiles, sums of the weight gradient."""
    dropped = sizes.tokens * sizes.vocabulary - cut.kept * cut.height * cut.width
    remade = 2 * sizes.hidden * dropped if sizes.dgrad or sizes.wgrad else 0
    summed = 8 * sizes.hidden * sizes.vocabulary * (len(cut.tokens) - 1) if sizes.wgrad else 0
    return remade + OPERATIONS_PER_BYTE * summed + OPERATIONS_PER_TILE * len(cut.tiles)


def _aligned(size: int) -> int:
    return ceil(size / ALIGNMENT) * ALIGNMENT


def _ranges(size: int, longest: int) -> list[slice]:
    """Ranges of this length, what is left over first: the last, which stays, is a whole one."""
    stops = list(range(size, 0, -longest))[::-1] or [0]
    return _slices([0, *stops])


def _evened(parts: list[slice], kept: int) -> list[slice]:
    """Those that are made again become alike, where the first was a rest.

    The backward pass ends with it, and a narrow one's wgrad hides little of the reduction of the input gradient.
    """
    remade = len(parts) - kept
    if remade < 2:
        return parts
    stop = parts[remade - 1].stop
    step = min(_aligned(ceil(stop / remade)), parts[remade - 1].stop - parts[remade - 1].start)
    return [*_ranges(stop, step), *parts[remade:]]


def _slices(bounds: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def partition_aligned(num_items: int, num_parts: int) -> list[int]:
    """Boundaries of ``num_parts`` ranges (at least one), at multiples of what so long ranges allow.

    >>> partition_aligned(128256, 16)[:4], partition_aligned(128256, 63)[:3], partition_aligned(10, 4)
    ([0, 8192, 16384, 24576], [0, 2048, 4096], [0, 3, 6, 8, 10])
    """
    num_parts = max(1, num_parts)
    for alignment in (ALIGNMENT, ALIGNMENT_OF_SHORT):
        if num_items // num_parts >= 4 * alignment:
            blocks = partition_uniform(ceil(num_items / alignment), num_parts)
            return [min(block * alignment, num_items) for block in blocks]
    return partition_uniform(num_items, num_parts)

"""How the LM head is cut: which tokens and which vocabulary columns make one tile of logits.

Pure Python. A tile ``[tokens, columns]`` of logits is the largest tensor of the head's loop; beside it, the
backward pass sums the input gradient ``[tokens, hidden]`` over vocabulary tiles in float32. Both together
keep within a memory bound.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from megatron_tiling.config import DEFAULT_HEAD_MEMORY_MIB
from megatron_tiling.tiles.grid import partition_uniform

MIB = 2**20
#: Long tiles begin at multiples of the widest tile of cuBLAS's kernels; short ones are divided evenly.
ALIGNMENT, ALIGN_FROM = 256, 2048
#: Narrower tiles spend their time reading and writing the sum of the input gradient.
LEAST_COLUMNS = 4096


@dataclass(frozen=True)
class HeadTiles:
    """What a user asks for: a memory bound, and sizes fixed by hand; no tile is larger than what there is.

    Args:
        memory_mib: bound for one tile of logits and the float32 sum of the input gradient together.
        tokens: tokens of a tile; ``None`` chooses.
        vocabulary_tiles: how many over this rank's vocabulary; ``None`` chooses.
    """

    memory_mib: int = DEFAULT_HEAD_MEMORY_MIB
    tokens: int | None = None
    vocabulary_tiles: int | None = None

    def cut(
        self, tokens: int, vocabulary: int, *, logit_bytes: int, token_bytes: int, may_tile_tokens: bool
    ) -> tuple[list[slice], list[slice]]:
        """Ranges of tokens and of vocabulary columns; each pair of them is a tile.

        Without sizes fixed by hand, all tokens make one tile while their sum leaves a quarter of the bound to
        the logits; the vocabulary is cut to fill the rest.

        Args:
            tokens, vocabulary: the size of all logits on this rank.
            logit_bytes: memory of one logit.
            token_bytes: memory a token takes beside its logits during the backward pass.
            may_tile_tokens: tile tokens too where the bound asks for it; else the bound gives way. Each token
                tile adds to the whole weight gradient, which loses precision where that is not float32.

        >>> sizes = {"logit_bytes": 2, "token_bytes": 4 * 4096}
        >>> tokens, columns = HeadTiles().cut(8192, 128256, **sizes, may_tile_tokens=True)
        >>> len(tokens), len(columns), columns[0]
        (1, 14, slice(0, 9216, None))
        """
        bound = self.memory_mib * MIB
        if self.tokens is not None:
            token_parts = [*range(0, max(tokens, 1), self.tokens), tokens]
        elif may_tile_tokens:
            columns = 0 if self.vocabulary_tiles is None else ceil(vocabulary / self.vocabulary_tiles)
            tile_bytes = token_bytes + columns * logit_bytes
            fits = tokens * max(tile_bytes, token_bytes * 4 // 3) <= bound
            tiles = 1 if fits else ceil(tokens * max(tile_bytes, token_bytes * 2) / bound)
            token_parts = partition_aligned(tokens, min(tiles, tokens))
        else:
            token_parts = [0, tokens]
        height = max(1, *(stop - start for start, stop in pairwise(token_parts)))

        vocabulary_tiles = self.vocabulary_tiles
        if vocabulary_tiles is None:
            widest = max((bound - height * token_bytes) // (height * logit_bytes), LEAST_COLUMNS)
            vocabulary_tiles = ceil(vocabulary / (widest // ALIGNMENT * ALIGNMENT))
        return _ranges(token_parts), _ranges(partition_aligned(vocabulary, min(vocabulary_tiles, vocabulary)))


def partition_aligned(num_items: int, num_parts: int) -> list[int]:
    """Boundaries of ``num_parts`` ranges (at least one), those of long ranges at multiples of ``ALIGNMENT``.

    >>> partition_aligned(128256, 16)[:4], partition_aligned(10, 4)
    ([0, 8192, 16384, 24576], [0, 3, 6, 8, 10])
    """
    num_parts = max(1, num_parts)
    if num_items // num_parts < ALIGN_FROM:
        return partition_uniform(num_items, num_parts)
    blocks = partition_uniform(ceil(num_items / ALIGNMENT), num_parts)
    return [min(block * ALIGNMENT, num_items) for block in blocks]


def _ranges(parts: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(parts)]

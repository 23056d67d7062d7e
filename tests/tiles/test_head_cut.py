"""Tiles of logits cover all of them once, within the bound."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_tiling.tiles.head_cut import HeadTiles


@given(
    tokens=st.integers(1, 40000),
    vocabulary=st.integers(1, 200000),
    hidden_size=st.integers(64, 8192),
    memory_mib=st.integers(16, 1024),
    may_tile_tokens=st.booleans(),
    token_tile=st.none() | st.integers(1, 5000),
    vocabulary_tiles=st.none() | st.integers(1, 64),
)
def test_tiles_cover_all_logits_once_within_the_bound(
    tokens, vocabulary, hidden_size, memory_mib, may_tile_tokens, token_tile, vocabulary_tiles
):
    token_bytes = 4 * hidden_size
    parts = HeadTiles(memory_mib, token_tile, vocabulary_tiles).cut(
        tokens, vocabulary, logit_bytes=2, token_bytes=token_bytes, may_tile_tokens=may_tile_tokens
    )
    for ranges, size in zip(parts, (tokens, vocabulary), strict=True):
        assert ranges[0].start == 0 and ranges[-1].stop == size
        assert all(one.stop == following.start for one, following in pairwise(ranges))
        assert all(part.start < part.stop for part in ranges)
    height, width = (max(part.stop - part.start for part in ranges) for ranges in parts)
    if token_tile is None and vocabulary_tiles is None and may_tile_tokens:
        slack = 256 * (2 * width + token_bytes) + 256 * 2 * height  # boundaries are rounded to blocks of 256
        least = 4096 * 2 * height if width <= 4352 else 0
        assert height * (2 * width + token_bytes) <= memory_mib * 2**20 + slack + least

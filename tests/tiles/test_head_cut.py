"""Tiles of logits cover all of them once, within the bound; and what stays from the forward pass."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tiling.tiles.head_cut import HeadSizes, HeadTiles

MIB = 2**20
LLAMA = HeadSizes(8192, 128256, 4096)


@given(
    tokens=st.integers(1, 40000),
    vocabulary=st.integers(1, 200000),
    hidden_size=st.integers(64, 8192),
    memory_mib=st.integers(16, 1024) | st.none(),
    sums_wgrad=st.booleans(),
    token_tile=st.none() | st.integers(1, 5000),
    vocabulary_tiles=st.none() | st.integers(1, 64),
    keep=st.none() | st.integers(0, 9) | st.just("all"),
    reduced_by=st.sampled_from([0, 1, 4]),
)
def test_tiles_cover_all_logits_once_within_the_bound(
    tokens, vocabulary, hidden_size, memory_mib, sums_wgrad, token_tile, vocabulary_tiles, keep, reduced_by
):
    sizes = HeadSizes(tokens, vocabulary, hidden_size, reduced_by=reduced_by, sums_wgrad=sums_wgrad)
    cut = HeadTiles(memory_mib, token_tile, vocabulary_tiles, keep).cut(sizes)
    for ranges, size in ((cut.tokens, tokens), (cut.columns, vocabulary)):
        assert ranges[0].start == 0 and ranges[-1].stop == size
        assert all(one.stop == following.start for one, following in pairwise(ranges))
        assert all(part.start < part.stop for part in ranges)
    assert len(cut.tiles) == len(cut.tokens) * len(cut.columns)
    assert 0 <= cut.kept <= len(cut.tiles)
    if token_tile is None and not sums_wgrad:
        assert len(cut.tokens) == 1
    if keep in (None, "all") or memory_mib is not None:
        assert (cut.kept > 0) == (keep != 0)
    else:
        assert cut.kept == min(keep, len(cut.tiles))


@pytest.mark.parametrize("memory_mib", [160, 272, 320, 650, 1024])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sums_wgrad", [False, True])
@pytest.mark.parametrize("hidden_size", [4096, 8192])
def test_all_that_the_backward_pass_holds_is_within_the_bound(memory_mib, ranks, sums_wgrad, hidden_size):
    sizes = HeadSizes(8192, 128256 // ranks, hidden_size, reduced_by=ranks if ranks > 1 else 0, sums_wgrad=sums_wgrad)
    cut = HeadTiles(memory_mib).cut(sizes)
    features = sizes.tokens * sizes.hidden * 2
    logits = max(cut.kept, 1) * cut.height * cut.width * 2
    several = len(cut.columns) > 1
    if len(cut.tokens) == 1 and several:  # its sum is rounded and reduced where it is, and copied after the logits
        held = max(logits, features // ranks)
    else:
        held = logits + min(features + (features // ranks if ranks > 1 else 0), memory_mib * MIB // 2)
    held += 4 * cut.height * sizes.hidden if several else 0
    if held > memory_mib * MIB:  # there is no such cut
        assert not sums_wgrad and cut.width == 4096
    else:
        assert cut.kept > 0


def test_keep() -> None:
    assert HeadTiles().cut(LLAMA).kept == 1
    assert HeadTiles(keep=0).cut(LLAMA).kept == 0
    assert HeadTiles(keep=5).cut(LLAMA).kept == 5
    everything = HeadTiles(keep="all").cut(LLAMA)
    assert len(everything.tiles) == everything.kept == 1
    by_hand = HeadTiles(vocabulary_tiles=32, keep="all")
    assert by_hand.cut(LLAMA).kept == 32
    half_a_gigabyte = HeadTiles(512, vocabulary_tiles=32, keep="all").cut(LLAMA._replace(sums_wgrad=False))
    assert half_a_gigabyte.kept == (512 - 128) * MIB // (8192 * 4096 * 2)
    assert HeadTiles(1, vocabulary_tiles=32, keep="all").cut(LLAMA).kept == 1
    quarter = LLAMA._replace(vocabulary=32064, reduced_by=4)
    assert HeadTiles(650).cut(quarter).kept == len(HeadTiles(650).cut(quarter).tiles) == 1


def test_frozen_sides_need_less() -> None:
    frozen_weight = HeadTiles().cut(LLAMA._replace(wgrad=False, sums_wgrad=False))
    assert len(frozen_weight.columns) == 1  # token tiles cost nothing, and the input gradient needs no sum
    assert HeadTiles().cut(LLAMA._replace(dgrad=False)).width > HeadTiles().cut(LLAMA).width


def test_without_a_backward_pass_the_bound_is_for_one_tile() -> None:
    cut = HeadTiles(272).cut(LLAMA._replace(dgrad=False, wgrad=False))
    assert cut.kept == 0 and cut.height * cut.width * 2 == 272 * MIB


def test_the_last_tile_is_a_whole_one() -> None:
    cut = HeadTiles(320).cut(LLAMA)
    assert cut.columns[-1].stop - cut.columns[-1].start == cut.width == 12288


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tiles_that_are_made_again_are_alike(ranks: int) -> None:
    cut = HeadTiles(320).cut(LLAMA._replace(vocabulary=128256 // ranks, reduced_by=ranks))
    widths = [part.stop - part.start for part in cut.columns]
    assert len(cut.tokens) == cut.kept == 1 and sum(widths) == 128256 // ranks
    first, *others = widths[: -cut.kept]
    assert len(set(others)) <= 1 and 0.8 * max(others) < first <= max(others) <= cut.width == widths[-1]


def test_many_tokens_leave_half_of_the_bound_to_tiles() -> None:
    """Of 32768 tokens the input gradient alone has 256 MiB."""
    cut = HeadTiles(272).cut(HeadSizes(32768, 151936, 4096))
    assert cut.height * (4 * 4096 + 2 * cut.width) <= 136 * MIB and cut.height >= 2048 and cut.width >= 8192


def test_what_is_reduced_where_it_is_summed_leaves_its_memory_to_logits() -> None:
    for ranks in (1, 4):
        assert HeadTiles(272).cut(LLAMA._replace(reduced_by=ranks)) == HeadTiles(272).cut(LLAMA)
    chosen = LLAMA._replace(tokens=4096, chosen_from=8192)
    assert HeadTiles(272).cut(chosen._replace(reduced_by=4)).width < HeadTiles(272).cut(chosen).width


def test_chosen_tokens_are_copied() -> None:
    half = LLAMA._replace(tokens=4096, chosen_from=8192)
    cut, whole = HeadTiles().cut(half), HeadTiles().cut(LLAMA._replace(tokens=4096))
    assert cut.height * cut.width < whole.height * whole.width

"""How a pass is cut into steps, and how ranks' partial sums are added up."""

import itertools

import pytest
import torch

from megatron_tiling.tiles import step_comm
from megatron_tiling.tiles.step_comm import Step, add_pieces, cut, few_steps, places, steps_for, tokens_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("multiple", [1, 6])
def test_every_row_of_every_rank_once(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_comm, "TOKEN_MULTIPLE", multiple)
    options = itertools.product(range(1, 12), (1, 3), range(1, 5), range(1, 9), ("both", "first", "last"))
    for rows, of_row, ranks, steps, own in options:
        found = cut(rows, of_row, ranks, steps, own)
        taken = [(piece.ahead, row) for step in found for piece in step.pieces for row in rows_of(piece.rows)]
        assert sorted(taken) == [(rank, row) for rank in range(ranks) for row in range(rows)]
        assert len(found) <= max(steps, min(ranks, 2))
        edges = [0, *itertools.accumulate(of_row * sum(len(rows_of(p.rows)) for p in s.pieces) for s in found)]
        assert [step.tokens for step in found] == [slice(*pair) for pair in itertools.pairwise(edges)]
        assert all(step.tokens.stop > step.tokens.start for step in found)


def rows_of(rows: slice) -> range:
    return range(rows.start, rows.stop)


@pytest.mark.parametrize("steps", [3, 4, 8, 20])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_own_tokens_come_first_and_last(ranks: int, steps: int) -> None:
    found = cut(2048, 1, ranks, steps)
    assert found[0].own_rows is not None and found[-1].own_rows is not None
    order = [piece.ahead for step in found for piece in step.pieces]
    assert [ahead for ahead, _ in itertools.groupby(order)] == [*range(ranks), 0]


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_own_tokens_are_one_step_where_nothing_is_sent_or_nothing_fetched(ranks: int, steps: int) -> None:
    rows = 42 * step_comm.TOKEN_MULTIPLE
    first, last = (cut(rows, 1, ranks, steps, own) for own in ("first", "last"))
    assert len(first) == len(last) == steps
    assert first[0].own_rows == last[-1].own_rows == slice(0, rows)
    assert [step.pieces for step in first[1:]] == [step.pieces for step in last[:-1]]
    assert len({step.tokens.stop - step.tokens.start for step in first[1:]}) == 1


def test_places_are_in_the_order_of_the_ranks() -> None:
    rows, ranks = 6, 4
    for rank, steps, own in itertools.product(range(ranks), range(2, 9), ("both", "first", "last")):
        found = cut(rows, 1, ranks, steps, own)
        taken = []
        for step in found:
            slices = places(step, rows, rank, ranks)
            expected = [(rank + p.ahead) % ranks * rows + row for p in step.pieces for row in rows_of(p.rows)]
            assert [row for rows_ in slices for row in rows_of(rows_)] == expected
            assert all(before.stop != after.start for before, after in itertools.pairwise(slices))
            assert len(slices) <= 2
            taken += expected
        assert sorted(taken) == [*range(rows * ranks)]


def test_few_steps_take_the_same_tokens_in_the_same_order() -> None:
    for rows, ranks, steps in itertools.product((512, 2048, 5000), (1, 2, 4), (2, 3, 6, 11)):
        fine = cut(rows, 1, ranks, steps)
        few = few_steps(fine)
        assert len(few) == min(ranks, 2) and few[-1].tokens.stop == fine[-1].tokens.stop
        assert ranks == 1 or few[0] == fine[0]
        orders = [[(p.ahead, row) for s in cut_ for p in s.pieces for row in rows_of(p.rows)] for cut_ in (fine, few)]
        assert orders[0] == orders[1]
        assert len(few[-1].pieces) <= ranks + 1


def test_two_steps_are_own_tokens_and_others() -> None:
    own, others = cut(2048, 2, 4, 2)
    assert own == Step(((0, slice(0, 2048)),), slice(0, 4096)) and own.own_rows == slice(0, 2048)
    assert [piece.ahead for piece in others.pieces] == [1, 2, 3] and others.own_rows is None


def test_not_all_lengths_that_ever_came_are_remembered() -> None:
    for rows in range(1, 300):
        cut(rows, 1, 2, 3)
    assert step_comm._cut.cache_info().currsize < 299


def test_few_tokens_go_in_fewer_steps() -> None:
    least = step_comm.LEAST_STEP_TOKENS
    assert [steps_for(tokens, 4) for tokens in (0, least, 2 * least, 3 * least - 1, 9 * least)] == [1, 1, 2, 2, 4]
    assert [steps_for(tokens, 4, 3 * least) for tokens in (2 * least, 3 * least - 1, 3 * least)] == [1, 1, 3]


def test_what_paid_on_gpus_and_what_did_not() -> None:
    """At TP=4, of one model's MLP, qkv and proj each: h and ffn, with 8 groups of 128 features."""
    for hidden, ffn, tokens, gained in (
        (8192, 28672, 8192, True),
        (4096, 14336, 16384, True),
        (4096, 14336, 8192, False),
    ):
        mlp, qkv, proj = 3 * hidden * ffn // 4, hidden * (hidden + 2 * 8 * 128) // 4, hidden * hidden // 4
        assert (tokens_for(step_comm.LEAST_MLP_OPERATIONS, mlp) <= tokens) == gained
        assert all(
            (tokens_for(step_comm.LEAST_LAYER_OPERATIONS, weights) <= tokens) == gained for weights in (qkv, proj)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3000), (4, 5, 7, 33), (8, 1), (3, 0)])
def test_sums_are_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pieces = torch.randn(shape, device=DEVICE).to(dtype)
    out = torch.empty(shape[1:], device=DEVICE, dtype=dtype)
    total = pieces[0].to(torch.promote_types(dtype, torch.float32))
    for piece in pieces[1:]:
        total = total + piece
    add_pieces(pieces, out)
    torch.testing.assert_close(out, total.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel(dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("megatron_tiling.tiles.kernels.add")
    for shape in ((2, 3000), (4, 5, 7, 33), (8, 1), (3, 0)):
        pieces = torch.randn(shape, device=DEVICE).to(dtype)
        out = torch.empty(shape[1:], device=DEVICE, dtype=dtype)
        total = pieces[0].float()
        for piece in pieces[1:]:
            total = total + piece.float()
        kernels.add(pieces, out)
        cuts_off = dtype == torch.bfloat16 and DEVICE == "cpu"  # Triton's interpreter does not round
        torch.testing.assert_close(out, total.to(dtype), rtol=2**-7 if cuts_off else 0, atol=0)

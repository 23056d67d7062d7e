"""Tiled scores against plain torch in float64, on one rank: values, gradients, masks, refusals; KL divergences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tiling import tiled_kl, tiled_scores
from megatron_tiling.tiles.head import HeadLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.scores import Scores, scores_of
from megatron_tiling.tiles.softmax import LogitScale
from tests.support.launch import torchrun
from tests.tiles.plain_scores import plain_scores, problem

EXACT = {"rtol": 1e-11, "atol": 1e-11}


@settings(max_examples=80)
@given(
    tokens=st.tuples(st.integers(1, 7), st.integers(1, 3)),
    vocabulary=st.integers(2, 40),
    hidden_size=st.integers(1, 9),
    k=st.integers(1, 5),
    token_tile=st.none() | st.integers(1, 21),
    vocabulary_tiles=st.none() | st.integers(1, 40),
    keep=st.sampled_from([None, 0, 2, "all"]),
    scale=st.sampled_from([1.0, 0.37, -2.0]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.6, 2.0]),
    masked=st.booleans(),
    counted=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_values_and_gradients_equal_plain_torch(
    tokens, vocabulary, hidden_size, k, token_tile, vocabulary_tiles, keep, scale, softcap, temperature, masked,
    counted, seed, data,
):  # fmt: skip
    case = problem(tokens, vocabulary, hidden_size, k, seed)
    top_k = data.draw(st.integers(1, vocabulary))
    mask = case.mask if masked else None
    logits = {"scale": scale, "softcap": softcap, "temperature": temperature}
    plain = plain_scores(*case[:3], mask, top_k=top_k, **logits)
    loop = HeadLoop(
        HeadTiles(None, token_tile, vocabulary_tiles, keep), scale=LogitScale(**logits), entropy=True, top_k=top_k
    )
    ours = scores_of(*case[:3], loop, mask, int(case.mask.sum()) if masked and counted else None)

    for name in ("log_probs", "entropy", "top_log_probs", "top_columns"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), **EXACT)
    outputs = [(ours.log_probs, ours.entropy), (plain.log_probs, plain.entropy)]
    found, expected = (torch.autograd.grad(output, case[:2], case[4:], allow_unused=True) for output in outputs)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("used", [("log_probs",), ("entropy",), ("log_probs", "entropy")])
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
def test_outputs_without_gradient_and_frozen_sides(used, frozen):
    case = problem((5, 2), 11, 4, 2, seed=2)
    if frozen:
        getattr(case, frozen).requires_grad_(False)
    trained = [value for value in case[:2] if value.requires_grad]
    upstream = {"log_probs": case.of_log_probs, "entropy": case.of_entropy}
    loop = HeadLoop(HeadTiles(tokens=3, vocabulary_tiles=4), entropy=True)
    both = []
    for scores in (scores_of(*case[:3], loop), plain_scores(*case[:3])):
        outputs = [getattr(scores, name) for name in used]
        both.append(torch.autograd.grad(outputs, trained, [upstream[name] for name in used]))
    torch.testing.assert_close(*both, **EXACT)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    case = problem((3, 2), 7, 4, 2, seed=1)
    columns = case.columns.clamp(0, 6)
    scale = LogitScale(0.7, softcap, 1.3)
    loop = HeadLoop(HeadTiles(tokens=2, vocabulary_tiles=3), scale=scale, entropy=True)

    def run(hidden, weight):
        scores = scores_of(hidden, weight, columns, loop, case.mask)
        return scores.log_probs, scores.entropy

    assert torch.autograd.gradcheck(run, case[:2])


def test_one_column_is_the_loss() -> None:
    case = problem((4, 3), 9, 5, 1, seed=4)
    labels = case.columns.squeeze(-1).clamp(0, 8)
    scores = tiled_scores(*case[:2], labels, entropy=True, top_k=2)
    exact = F.cross_entropy((case.hidden @ case.weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(-scores.log_probs.flatten(), exact, **EXACT)
    assert scores.log_probs.shape == scores.entropy.shape == (4, 3) and scores.top_columns.shape == (4, 3, 2)
    turned = scores.transposed()
    assert turned.top_columns.shape == (3, 4, 2) and turned.mask is None
    assert tiled_scores(*case[:2], labels).entropy is None


def test_masked_tokens_are_not_projected(monkeypatch):
    from megatron_tiling.tiles import head_memory

    rows = []
    gemm_into = head_memory.gemm_into
    monkeypatch.setattr(
        head_memory, "gemm_into", lambda out, *args, **kwargs: rows.append(len(out)) or gemm_into(out, *args, **kwargs)
    )
    case = problem((6, 3), 9, 5, 1, seed=4)
    tiled_scores(*case[:3], mask=case.mask).log_probs.sum().backward()
    assert set(rows) == {int(case.mask.sum())}
    assert not case.hidden.grad[~case.mask].any()
    nothing = tiled_scores(*case[:3], mask=torch.zeros_like(case.mask), entropy=True, top_k=2)
    nothing.log_probs.sum().backward()
    assert not nothing.log_probs.any() and not nothing.entropy.any() and not nothing.top_columns.any()


@pytest.mark.parametrize("tokens", [(0, 2), (3, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_batches_without_tokens(tokens, masked, k):
    case = problem(tokens, 9, 5, k, seed=4)
    scores = tiled_scores(*case[:3], mask=case.mask if masked else None, entropy=True, top_k=2)
    assert scores.log_probs.shape == (*tokens, k) and scores.top_columns.shape == (*tokens, 2)
    (scores.log_probs.sum() + scores.entropy.sum()).backward()
    assert case.hidden.grad.shape == (*tokens, 5) and not case.weight.grad.any()


@pytest.mark.parametrize("mask_count", [None, "right"])
def test_weight_gradient_is_added_to_main_grad(mask_count):
    case = problem((5, 2), 11, 4, 2, seed=3)
    expected = torch.autograd.grad(plain_scores(*case[:4]).log_probs, case.weight, case.of_log_probs)[0]
    parameter = torch.nn.Parameter(case.weight.detach())
    parameter.main_grad = torch.ones_like(parameter)
    count = None if mask_count is None else int(case.mask.sum())
    scores = tiled_scores(case.hidden, parameter, case.columns, mask=case.mask, mask_count=count, fuse_wgrad=True)
    scores.log_probs.backward(case.of_log_probs)
    torch.testing.assert_close(parameter.main_grad, 1 + expected, **EXACT)
    assert parameter.grad is None
    parameter.main_grad = None  # as Megatron-FSDP leaves it
    scores = tiled_scores(case.hidden, parameter, case.columns, mask=case.mask, mask_count=count, fuse_wgrad=True)
    scores.log_probs.backward(case.of_log_probs)
    torch.testing.assert_close(parameter.grad, expected, **EXACT)


def test_logits_in_fp32_are_not_rounded():
    case = problem((16, 4), 96, 64, 1, seed=5)
    hidden, weight = (value.detach().to(torch.bfloat16) for value in case[:2])
    exact = plain_scores(hidden.double(), weight.double(), case.columns)
    errors, gradients = [], []
    for in_fp32 in (True, False):
        x = hidden.clone().requires_grad_()
        loop = HeadLoop(HeadTiles(vocabulary_tiles=3), logits_in_fp32=in_fp32, entropy=True)
        scores = scores_of(x, weight, case.columns, loop)
        scores.log_probs.backward(case.of_log_probs.float())
        errors.append((scores.log_probs - exact.log_probs).abs().max())
        gradients.append(x.grad.double())
    assert errors[0] < 2e-5 and errors[1] > 100 * errors[0]
    wide = hidden.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        plain_scores(wide, weight.double(), case.columns).log_probs, wide, case.of_log_probs
    )
    first, second = ((gradient - expected).norm() for gradient in gradients)
    assert first < second


def test_what_does_not_belong_together_is_refused():
    case = problem((4, 3), 9, 5, 2, seed=7)
    for arguments, message in (
        ({"columns": case.columns.transpose(0, 1)}, r"columns have shape \[3, 4\], the hidden states \[4, 3\] tokens"),
        ({"mask": case.mask.t()}, r"mask values have shape \[3, 4\]"),
        ({"top_k": 10}, "top_k 10: the vocabulary has 9 columns"),
        ({"temperature": 0.0}, "temperature 0.0: must be greater than 0"),
        ({"softcap": math.inf}, "softcap inf: must be greater than 0, and finite"),
        ({"memory_mib": 0}, "memory_mib 0: must be a whole number of at least 1"),
        ({"memory_mib": 1.5}, "memory_mib 1.5: must be a whole number"),
        ({"softcap": -1.0}, "softcap -1.0: must be greater than 0"),
        ({"mask_count": 3}, "mask_count 3: there is no mask"),
        ({"sequence_parallel": True}, "sequence_parallel: needs the tp_group"),
    ):
        with pytest.raises(ValueError, match=message):
            tiled_scores(*case[:2], **({"columns": case.columns} | arguments))
    with pytest.raises(RuntimeError, match="mask_count 3: the mask has another number"):
        tiled_scores(*case[:3], mask=torch.ones_like(case.mask), mask_count=3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("rest", ["bucket", "ignore"])
def test_kl(direction, rest):
    case = problem((4, 3), 12, 5, 1, seed=6)
    other = problem((4, 3), 12, 5, 1, seed=9)
    teacher, columns = (other.hidden @ other.weight.t()).detach().log_softmax(-1).topk(4, dim=-1)
    student = (case.hidden @ case.weight.t()).log_softmax(-1).gather(-1, columns)
    p, q = teacher.exp(), student.exp()
    if rest == "bucket":
        p, q = (torch.cat([value, 1 - value.sum(-1, keepdim=True)], dim=-1) for value in (p, q))
    first, second = (p, q) if direction == "forward" else (q, p)
    exact = (first * (first / second).log()).sum(-1) * case.mask

    scores = tiled_scores(*case[:2], columns, mask=case.mask)
    ours = tiled_kl(scores, teacher, direction=direction, rest=rest)
    torch.testing.assert_close(ours, exact, **EXACT)
    found, expected = (torch.autograd.grad(kl, case[:2], case.of_entropy) for kl in (ours, exact))
    torch.testing.assert_close(found, expected, **EXACT)


def test_kl_of_all_that_there_is() -> None:
    """Nothing is left for the bucket; a teacher's column may have no probability at all."""
    scores = Scores(torch.tensor([[[0.5, 0.5, 1e-30]]]).log().requires_grad_())
    teacher = torch.tensor([[[0.25, 0.75, 0.0]]]).log()
    kl = tiled_kl(scores, teacher)
    kl.sum().backward()
    assert abs(kl.item() - 0.1308) < 1e-4 and scores.log_probs.grad.isfinite().all()
    with pytest.raises(ValueError, match="teacher_log_probs have shape"):
        tiled_kl(scores, teacher[..., :2])
    with pytest.raises(ValueError, match=r"scores have shape \[1, 3\]: must be \[s, b, k\]"):
        tiled_kl(Scores(scores.log_probs[0]), teacher[0])
    with pytest.raises(ValueError, match="choose forward or reverse"):
        tiled_kl(scores, teacher, direction="backward")


@pytest.mark.parametrize("tensor_parallel", [2, 4])
def test_ranks_that_share_the_vocabulary(tensor_parallel):
    assert "scores equal plain torch" in torchrun("-m", "tests.tiles.check_scores", world=tensor_parallel)

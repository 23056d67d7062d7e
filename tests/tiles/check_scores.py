"""Vocabulary-parallel scores against plain torch in float64, with and without sequence parallelism; and in bfloat16.

torchrun --standalone --nproc-per-node TP -m tests.tiles.check_scores
"""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tiling.tiles import head, head_memory
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.head import HeadLoop
from megatron_tiling.tiles.head_cut import HeadSizes, HeadTiles
from megatron_tiling.tiles.scores import scores_of, tiled_scores
from megatron_tiling.tiles.softmax import LogitScale
from tests.support.harness import Counter, leave, peak_bytes, relative_error
from tests.tiles.plain_scores import plain_scores, problem

SEQUENCE, BATCH, VOCABULARY, HIDDEN = 8, 3, 44, 6


def check(seed: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    sequence_parallel, masked, top_k = bool(seed % 2), seed % 3 > 0, (1, 3, VOCABULARY)[seed % 3]
    case = problem((SEQUENCE, BATCH), VOCABULARY, HIDDEN, 1 + seed % 4, seed)
    mask = case.mask if masked else None
    logits = {"softcap": (None, 2.5)[seed // 2 % 2], "temperature": 0.7}
    plain = plain_scores(*case[:3], mask, top_k=top_k, **logits)
    expected = torch.autograd.grad((plain.log_probs, plain.entropy), case[:2], case[4:])

    tokens = slice(rank * SEQUENCE // ranks, (rank + 1) * SEQUENCE // ranks) if sequence_parallel else slice(None)
    columns = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    hidden, weight = (value.detach().clone().requires_grad_() for value in (case.hidden[tokens], case.weight[columns]))
    with Counter() as counter:
        if seed < 6:
            scores = tiled_scores(
                hidden, weight, case.columns, entropy=True, top_k=top_k, mask=mask, tp_group=group,
                sequence_parallel=sequence_parallel, **logits,
            )  # fmt: skip
        else:
            comm = ColumnComm(group, sequence_parallel, not sequence_parallel, lambda s, d: torch.empty(s, dtype=d))
            tiles = HeadTiles(None, 1 + seed, 1 + seed % 5, (None, 0, "all")[seed % 3])
            loop = HeadLoop(tiles, group, comm, scale=LogitScale(**logits), entropy=True, top_k=top_k)
            scores = scores_of(hidden, weight, case.columns, loop, mask)
    assert counter.collectives["allreduce_"] == 2, counter.collectives
    found = torch.autograd.grad((scores.log_probs, scores.entropy), (hidden, weight), case[4:])
    for name in ("log_probs", "entropy", "top_log_probs", "top_columns"):
        torch.testing.assert_close(getattr(scores, name), getattr(plain, name), rtol=1e-11, atol=1e-11)
    right = expected[0][tokens], expected[1][columns]
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def comm_of(sequence_parallel: bool, buffer: Tensor | None = None) -> ColumnComm:
    """Gathers into ``buffer``, if it is given."""
    group = dist.group.WORLD
    assert group is not None

    def gather_buffer(shape: Any, dtype: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype) if buffer is None else buffer.view(shape)

    return ColumnComm(group, sequence_parallel, not sequence_parallel, gather_buffer)


def check_narrow(sequence_parallel: bool) -> None:
    """A sum of several vocabulary tiles in float32, rounded where it is or beside it, as tokens are one tile or two."""
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    case = problem((SEQUENCE, BATCH), VOCABULARY, HIDDEN, 1, 3)
    hidden, weight = (value.detach().bfloat16() for value in case[:2])
    plain_inputs = [value.double().requires_grad_() for value in (hidden, weight)]
    plain = plain_scores(*plain_inputs, case.columns, None, top_k=0)
    wanted, _ = torch.autograd.grad(plain.log_probs, plain_inputs, case[4])
    tokens = slice(rank * SEQUENCE // ranks, (rank + 1) * SEQUENCE // ranks) if sequence_parallel else slice(None)
    columns = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    for token_tile in (None, 13):
        part = hidden[tokens].clone().requires_grad_()
        tiles = HeadTiles(tokens=token_tile, vocabulary_tiles=3)
        loop = HeadLoop(tiles, group, comm_of(sequence_parallel))
        scores = scores_of(part, weight[columns], case.columns, loop)
        (found,) = torch.autograd.grad(scores.log_probs, part, case[4].float())
        assert found.untyped_storage().nbytes() == 2 * found.numel()
        error = relative_error(found.double(), wanted[tokens])
        assert error < 8e-3, (error, sequence_parallel, token_tile)


def check_memory(sequence_parallel: bool, bound_mib: int) -> None:
    """What the backward pass holds is within the bound; nothing is computed."""
    group = dist.group.WORLD
    assert group is not None
    tokens, hidden_size, vocabulary = 1024, 1024, 16384
    shape = tokens // group.size() if sequence_parallel else tokens, 1, hidden_size
    hidden = torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(vocabulary, hidden_size, dtype=torch.bfloat16)
    comm = comm_of(sequence_parallel, torch.zeros(tokens, 1, hidden_size, dtype=torch.bfloat16))
    labels, upstream = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    nothing = SimpleNamespace(update_statistics=lambda *_: None, logits_to_gradient=lambda *_: None)
    tiles = HeadTiles(bound_mib)
    sizes = HeadSizes(tokens, vocabulary, hidden_size, reduced_by=group.size() if sequence_parallel else 1, wgrad=False)
    cut = tiles.cut(sizes)
    assert len(cut.tokens) == 1 < len(cut.columns)
    with (
        patch.object(head, "softmax_for", lambda x: nothing),
        patch.object(head_memory, "gemm_into", lambda *_, accumulate: None),
    ):
        loop = HeadLoop(tiles, group, comm)
        held = peak_bytes(lambda: head.tiled_linear_cross_entropy(hidden, weight, labels, loop).loss.backward(upstream))
    assert held <= bound_mib * 2**20 + 64 * tokens, (held / 2**20, cut, sequence_parallel)


def main() -> None:
    dist.init_process_group("gloo")
    for seed in range(18):
        check(seed)
    for sequence_parallel in (False, True):
        check_narrow(sequence_parallel)
        for bound_mib in (12, 16, 24):
            check_memory(sequence_parallel, bound_mib)
    if dist.get_rank() == 0:
        print("scores equal plain torch")
    leave()


if __name__ == "__main__":
    main()

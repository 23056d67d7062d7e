"""Vocabulary-parallel scores against plain torch in float64, with and without sequence parallelism.

torchrun --standalone --nproc-per-node TP -m tests.tiles.check_scores
"""

import torch
import torch.distributed as dist

from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.head import HeadLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.scores import scores_of, tiled_scores
from megatron_tiling.tiles.softmax import LogitScale
from tests.support.harness import Counter
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


def main() -> None:
    dist.init_process_group("gloo")
    for seed in range(18):
        check(seed)
    if dist.get_rank() == 0:
        print("scores equal plain torch")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What the planner's TransformerEngine does with tokens: to experts and back (permutation.py), router, loss."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.kernels import run


def _permuted(tokens: Tensor, probs: Tensor | None, routing_map: Tensor, rows: int) -> Any:
    """permutation.py: ``[rows, h]``, a map, probabilities of rows. Keeps: the map, int32 ``[T, 2 experts + 1]``."""
    count, experts = routing_map.shape

    def kernel(tokens: Tensor, probs: Tensor | None) -> Any:
        index = tokens.new_empty(count, 2 * experts + 1, dtype=torch.int32)
        output = tokens.new_empty(rows, tokens.shape[1])
        scores = None if probs is None else probs.new_empty(rows)

        def gradients(index: Tensor, grad: Tensor, grad_index: Any, grad_probs: Tensor | None) -> Any:
            of_probs = None if grad_probs is None else grad_probs.new_empty(count, experts)
            return grad.new_empty(count, grad.shape[1]), of_probs

        return (output, index, scores), (index,), gradients

    return run(kernel, tokens, probs)


def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int, *args: Any, **options: Any) -> Any:
    """See ``_permuted``."""
    output, index, _ = _permuted(inp, None, routing_map, num_out_tokens)
    return output, index


def moe_permute_with_probs(inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int) -> Any:
    """See ``_permuted``."""
    output, index, scores = _permuted(inp, probs, routing_map, num_out_tokens)
    return output, scores, index


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: Any = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Any = None,
) -> Tensor:
    """permutation.py: ``[T, h]``. Keeps: the map; with probabilities the input and these."""
    merging_probs = probs if probs is not None else merging_probs

    def kernel(rows: Tensor, probs: Tensor | None) -> Any:
        output = rows.new_empty(row_id_map.shape[0], rows.shape[1])
        count = rows.shape[0]

        def gradients(*saved_and_grad: Any) -> Any:
            probs, grad = saved_and_grad[1], saved_and_grad[-1]
            return grad.new_empty(count, grad.shape[1]), None if probs is None else torch.empty_like(probs)

        return output, (row_id_map, probs, None if probs is None else rows), gradients

    return run(kernel, inp, merging_probs)


def moe_sort_chunks_by_index_with_probs(inp: Tensor, probs: Any, split_sizes: Any, sorted_index: Any) -> Any:
    """permutation.py: the rows in another order. Keeps: int32 ``[rows]``."""

    def kernel(rows: Tensor, probs: Tensor | None) -> Any:
        index = rows.new_empty(rows.shape[0], dtype=torch.int32)
        scores = None if probs is None else torch.empty_like(probs)

        def gradients(index: Tensor, grad: Tensor, grad_probs: Any) -> Any:
            return torch.empty_like(grad), None if grad_probs is None else torch.empty_like(grad_probs)

        return (torch.empty_like(rows), scores), (index,), gradients

    return run(kernel, inp, probs)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Any, sorted_index: Any) -> Any:
    """As with probabilities."""
    return moe_sort_chunks_by_index_with_probs(inp, None, split_sizes, sorted_index)[0]


def fused_topk_with_score_function(logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """router.py: probabilities and a map. Keeps: the bool ``[T, experts]`` map and as many float32 scores."""

    def kernel(logits: Tensor) -> Any:
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        scores = torch.empty_like(logits, dtype=torch.float32)
        gradients = lambda routing_map, scores, grad, _: (torch.empty_like(grad),)  # noqa: E731
        return (torch.empty_like(logits), routing_map), (routing_map, scores), gradients

    return run(kernel, logits)


def fused_compute_score_for_moe_aux_loss(logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """router.py. Keeps: float32 ``[T, experts]``. Makes: the map and float32 scores."""

    def kernel(logits: Tensor) -> Any:
        scores, dtype = torch.empty_like(logits, dtype=torch.float32), logits.dtype
        gradients = lambda scores, _, grad: (torch.empty_like(grad, dtype=dtype),)  # noqa: E731
        outputs = torch.empty_like(logits, dtype=torch.bool), torch.empty_like(scores)
        return outputs, (scores,), gradients

    return run(kernel, logits)


def fused_moe_aux_loss(probs: Tensor, tokens_per_expert: Tensor, *args: Any, **options: Any) -> Tensor:
    """router.py. Keeps: a number. Makes: the gradient of the probabilities."""

    def kernel(probs: Tensor) -> Any:
        shape = probs.shape
        return probs.new_empty(()), (tokens_per_expert,), lambda tokens, grad: (grad.new_empty(shape),)

    return run(kernel, probs)


def parallel_cross_entropy(
    inp: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    dist_process_group: Any = None,
    ignore_idx: int = -100,
    is_cg_capturable: bool = False,
) -> Tensor:
    """cross_entropy.py, triton/cross_entropy.py.

    Keeps: the logits, in which the forward pass leaves their gradient; the backward pass scales it there.
    Makes: float32 ``[T]`` losses, ``[3 T]`` statistics and those of all ranks.
    """

    def kernel(logits: Tensor) -> Any:
        rows = logits.numel() // logits.shape[-1]
        loss = logits.new_empty(rows, dtype=torch.float32)
        statistics = logits.new_empty(3 * rows, dtype=torch.float32)
        if dist_process_group is not None and dist_process_group.size() > 1:
            statistics.new_empty(3 * rows * dist_process_group.size())
        logits = logits.contiguous()
        result = loss.sum() if reduce_loss else loss.view(logits.shape[:-1])
        return result, (logits.detach(),), lambda gradient, grad_loss: (gradient,)

    return run(kernel, inp)

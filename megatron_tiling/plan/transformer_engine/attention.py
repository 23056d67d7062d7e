"""The planner's DotProductAttention, its three backends (attention/dot_product_attention/), and rotary embeddings."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.transformer_engine.kernels import run
from megatron_tiling.plan.transformer_engine.refused import refusal


def _backend() -> str:
    """As NVTE_*_ATTN say, which Megatron sets by --attention-backend: of several that on Hopper (utils.py)."""
    on = {name: os.getenv(f"NVTE_{name.upper()}_ATTN", "1") == "1" for name in ("fused", "flash", "unfused")}
    chosen = next((name for name, is_on in on.items() if is_on), None)
    if chosen is None:
        raise ValueError("NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN are all 0: no attention is left")
    return chosen


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """``[s, b, heads, d]`` -> ``[b, s, heads, d]``, which flash attention takes: copies, unless ``b`` is 1."""
    return [tensor.transpose(0, 1).contiguous() for tensor in tensors]


def _keys_of_a_query(keys: int, causal: bool, window: Sequence[int]) -> float:
    """On average, within so many before and after it; -1: all."""
    sides = [keys if side < 0 else min(side + 1, keys) for side in window[: 1 if causal else 2]]
    return sum(side - side * side / (2 * keys) for side in sides)


def _flash(seen: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Flash attention of ``[b, s, heads, d]`` (flash_attn/cute/interface.py 4.0.0; 2 and 3 on Hopper alike).

    Keeps: queries, keys, values, output; float32 ``[b, heads, s]`` logarithms of sums. Makes, in the backward pass:
    the gradients; float32 ones of queries, and of keys and values where heads share them; two of the logarithms' size.

    Args:
        seen: keys, by a query, on average: for the clock.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Any:
        batch, length, heads, _ = query.shape
        CLOCK.attend(2, query, seen)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)

        def gradients(query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, grad: Tensor) -> Any:
            CLOCK.attend(5, query, seen)
            grad = grad.contiguous()
            found = [torch.empty_like(tensor) for tensor in (query, key, value)]
            wide = [query, key, value] if query.shape[2] != key.shape[2] else [query]
            padded = [math.ceil(tensor.shape[1] / 128) * 128 for tensor in wide]
            accumulators = [
                tensor.new_empty(tensor.shape[0], rows, *tensor.shape[2:], dtype=torch.float32)
                for tensor, rows in zip(wide, padded, strict=True)
            ]
            statistics = [torch.empty_like(sums) for _ in range(2)]
            CLOCK.touch(accumulators, accumulators, accumulators)  # cleared, added to, and cast
            del accumulators, statistics
            return found

        return output, (query, key, value, output, sums), gradients

    return run(kernel, query, key, value)


def _fused(seen: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's attention of ``[s, b, heads, d]`` (backends.py, FusedAttnFunc).

    Keeps: queries, keys, values, output; float32 ``[b, heads, s, 1]``; two numbers of the random state. Makes, in the
    backward pass: the gradients. Its workspace is cuDNN's: taken as float32 gradients of the queries, and ``[b, heads,
    s]`` sums, not read from a source.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Any:
        length, batch, heads, _ = query.shape
        CLOCK.attend(2, query, seen)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        statistics = query.new_empty(batch, heads, length, 1, dtype=torch.float32)

        def gradients(query: Tensor, key: Tensor, value: Tensor, output: Any, statistics: Tensor, grad: Tensor) -> Any:
            CLOCK.attend(5, query, seen)
            found = [torch.empty_like(tensor) for tensor in (query, key, value)]
            workspace = torch.empty_like(query, dtype=torch.float32), torch.empty_like(statistics)
            del workspace
            return found

        return output, (query, key, value, output, statistics), gradients

    return run(kernel, query, key, value)


def _softmax(scores: Tensor) -> Tensor:
    """softmax.py. Keeps: the result. Makes: it; the gradient."""

    def kernel(scores: Tensor) -> Any:
        result = torch.empty_like(scores)
        return result, (result,), lambda result, grad: (torch.empty_like(result),)

    return run(kernel, scores)


class DotProductAttention(torch.nn.Module):
    """Causal or full attention of whole sequences. The unfused backend is torch's products around one softmax."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        cp_group: Any = None,
        window_size: tuple[int, int] | None = None,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = [
            group.size() for group in (cp_group if isinstance(cp_group, list) else [cp_group]) if group is not None
        ]
        if math.prod(sizes) > 1:
            raise refusal(f"TransformerEngine's attention across ranks (--context-parallel-size {math.prod(sizes)})")
        if softmax_type != "vanilla" or return_max_logit:
            flags = "--softmax-type, --qk-clip and --log-max-attention-logit"
            raise refusal("attention with an option of these", f"leave out {flags}")
        self.window = window_size or (-1, -1)
        self.attention_dropout = torch.nn.Dropout(attention_dropout)
        self._forks = get_rng_state_tracker if attention_dropout else None

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Any = None, **options: Any
    ) -> Tensor:
        """``[s, b, heads, d]`` -> ``[s, b, heads d]``; ``[t, heads, d]`` of packed sequences -> ``[t, heads d]``."""
        packed = query_layer.dim() == 3
        if packed:
            query_layer, key_layer, value_layer = (x.unsqueeze(1) for x in (query_layer, key_layer, value_layer))
        value_layer = value_layer.contiguous()  # not a layout that it knows, beside rotated queries and keys
        causal = "causal" in str(options.get("attn_mask_type", "causal"))
        seen = _keys_of_a_query(len(key_layer), causal, self.window)
        backend = _backend()
        if backend == "flash":
            output = _flash(seen, *_heads_first(query_layer, key_layer, value_layer))
            output = output.flatten(2).transpose(0, 1).contiguous()
        elif backend == "fused":
            output = _fused(seen, query_layer, key_layer, value_layer).flatten(2)
        else:
            output = self._unfused(query_layer, key_layer, value_layer)
        return output.squeeze(1) if packed else output

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """backends.py, UnfusedDotProductAttention. Keeps: what torch's products do, and probabilities."""
        length, batch, heads, _ = query.shape
        if key.shape[2] != heads:
            key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
        query, key, value = (x.reshape(x.shape[0], batch * heads, -1).transpose(0, 1) for x in (query, key, value))
        scores = query.new_empty(batch * heads, length, key.shape[1])
        scores = torch.baddbmm(scores, query, key.transpose(1, 2), beta=0.0).view(batch, heads, length, -1)
        with self._forks().fork() if self._forks is not None else nullcontext():
            probabilities = self.attention_dropout(_softmax(scores))
        output = torch.bmm(probabilities.view(batch * heads, length, -1), value)
        return output.view(batch, heads, length, -1).permute(2, 0, 1, 3).contiguous().view(length, batch, -1)


def _rotated(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, fused: bool = False, **options: Any) -> Tensor:
    """attention/rope.py. Keeps: the table of angles, in float32, which is shared. Makes: nothing."""

    def kernel(tensor: Tensor) -> Any:
        return _rotated(tensor), (freqs.float(),), lambda table, grad: (_rotated(grad),)

    return run(kernel, t)


def apply_fused_qkv_rotary_pos_emb(
    qkv: Tensor, q_freqs: Tensor, k_freqs: Tensor, qkv_split_arg_list: list[int], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """attention/rope.py: queries, keys and values, three new tensors. Keeps: the tables. Makes: nothing."""
    width = qkv_split_arg_list[-1]

    def kernel(mixed: Tensor) -> Any:
        shape = mixed.shape
        parts = [mixed.new_empty(*shape[:-2], shape[-2] * size // width, width) for size in qkv_split_arg_list]
        return tuple(parts), (q_freqs, k_freqs), lambda q, k, *grads: (grads[0].new_empty(shape),)

    return run(kernel, qkv)

"""Models that benchmarks time have an attention that attends."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpt import check_attention


def attention(query: Tensor, key: Tensor, value: Tensor, mask: None, attn_mask_type: Any) -> Tensor:
    parts = [part.permute(1, 2, 0, 3).float() for part in (query, key, value)]  # not all processors do it in bf16
    return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def layer(core_attention: Callable[..., Tensor]) -> SimpleNamespace:
    return SimpleNamespace(
        num_attention_heads_per_partition=4, num_query_groups_per_partition=2, core_attention=core_attention
    )


def test_attention_is_compared_with_torchs() -> None:
    check_attention(layer(attention), "cpu")


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_kernels_that_attend_to_nothing_end_a_benchmark(factor: float) -> None:
    with pytest.raises(SystemExit, match="off from torch's; choose others by --attention"):
        check_attention(layer(lambda *args, **kwargs: attention(*args, **kwargs) * factor), "cpu")

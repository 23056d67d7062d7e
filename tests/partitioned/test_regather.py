"""What a partitioned column layer keeps under sequence parallelism is checked as autograd checks saved tensors."""

import pytest
import torch

from megatron_tiling.partitioned.regather import regathered_in_backward


def test_a_shard_that_was_changed_in_place_is_refused() -> None:
    shard, whole = torch.ones(2, 3), torch.ones(4, 3)
    weight = torch.ones(3, requires_grad=True)
    with regathered_in_backward(whole, shard, group=None):
        output = whole * weight
    shard.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()

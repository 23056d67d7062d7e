"""What a partitioned column layer keeps under sequence parallelism is checked as autograd checks saved tensors."""

import pytest
import torch

from megatron_tiling.partitioned.regather import _Regathered


def test_a_shard_that_was_changed_in_place_is_refused() -> None:
    shard = torch.ones(2, 3)
    kept = _Regathered(shard.detach(), group=None)
    shard.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.take()

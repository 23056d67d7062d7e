"""Seconds of kernels: products by their tiles, others by their bytes, attention by both."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tiling.plan.clock import H100, Clock
from megatron_tiling.plan.process_groups import fake_process_groups
from megatron_tiling.plan.tracker import Tracker


@pytest.fixture
def clock() -> Clock:
    return Clock(H100)


def seconds(clock: Clock, rows: int, inner: int, columns: int) -> float:
    with FakeTensorMode(), Tracker(on_operation=clock.operation):
        left, right = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((rows, inner), (inner, columns)))
        clock.clear()
        left @ right
    return clock.seconds


@pytest.mark.parametrize(
    ("shape", "milliseconds"),
    [((8192, 4096, 28672), 2.445), ((8192, 28672, 4096), 2.455), ((8192, 14336, 4096), 1.251)],
)
def test_products_as_measured(clock: Clock, shape: tuple[int, int, int], milliseconds: float) -> None:
    """benchmarks/results/2026-11-27-mlp-te.md, kernels of TransformerEngine, from which the rates are."""
    assert 1000 * seconds(clock, *shape) == pytest.approx(milliseconds, rel=0.05)


def test_narrow_tiles_are_slower(clock: Clock) -> None:
    whole = seconds(clock, 4096, 8192, 14336)
    assert 1.02 * whole < 8 * seconds(clock, 4096, 8192, 14336 // 8) < 1.3 * whole
    assert seconds(clock, 1, 4096, 4096) >= 2 * 4096 * 4096 / H100.bandwidth


def test_other_operations_by_what_they_read_and_write(clock: Clock) -> None:
    bytes_ = []

    def operation(*op: Any) -> None:
        clock.clear()
        clock.operation(*op)
        bytes_.append(clock.seconds * H100.bandwidth)

    with FakeTensorMode():
        x, y = torch.ones(1024), torch.ones(1024, dtype=torch.bfloat16)
        with Tracker(on_operation=operation):
            x + x
            x.copy_(y)
            x.zero_()
            x.view(2, 512)
            torch.empty_like(x)
    assert bytes_ == pytest.approx([12288, 6144, 4096, 0, 0])


def test_attention_grows_with_the_square(clock: Clock) -> None:
    def attended(tokens: int) -> float:
        clock.clear()
        query: Tensor = torch.empty(1, tokens, 32, 128, device="meta")
        clock.attend(2, query, tokens / 2)
        return clock.seconds

    assert attended(2**24) == pytest.approx(2 * 2 * 2.0**48 * 32 * 128 / 2 / H100.attention, rel=1e-3)
    assert 3.3 < attended(8192) / attended(4096) < 4  # few keys take longer each


def test_once_a_step(clock: Clock) -> None:
    x = torch.empty(1024, device="meta")
    clock.touch(x)
    with clock.once_a_step():
        clock.touch([x, x])
    assert clock.once == pytest.approx(2 * clock.seconds / 3)


def test_collectives_of_one_rank_take_no_time(clock: Clock) -> None:
    fake_process_groups(world=4, rank=0)
    try:
        alone = torch.distributed.new_group([0])
        with FakeTensorMode(), Tracker(on_operation=clock.operation):
            x = torch.empty(1024)
            torch.distributed.all_reduce(x, group=alone)
            assert not clock.seconds
            torch.distributed.all_reduce(x, async_op=True)
            assert not clock.seconds
            torch.distributed.all_reduce(x)
        assert clock.seconds == pytest.approx(2 * 4096 * 3 / 4 / H100.link)
    finally:
        torch.distributed.destroy_process_group()

"""Process groups that do nothing: one rank of many, alone in its process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fake_process_groups(world: int, rank: int) -> None:
    """This process is one rank of ``world``, whose collectives return at once: others have what it has."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    distributed: Any = torch.distributed
    stock = distributed.new_group

    def new_group(*args: Any, backend: Any = None, pg_options: Any = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(distributed, name, _held_until_waited_for(getattr(distributed, name)))
    distributed.new_group, distributed.all_gather_object = new_group, all_gather_object
    distributed.broadcast_object_list = lambda object_list, *args, **kwargs: None


def _held_until_waited_for(collective: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL's collectives, where they are asynchronous, hold the tensors that they are given.

    Hazard: who took a function at its import, as Megatron's local layers do, has the one that holds nothing.
    """

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        work = collective(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return None if work is None else _Work(work, given)

    return call


class _Work:
    """What is under way, and the tensors that it holds."""

    def __init__(self, work: torch.distributed.Work, tensors: list[Tensor]) -> None:
        self._work, self._tensors = work, tensors

    def wait(self, *timeout: Any) -> bool:
        self._tensors = []
        return self._work.wait(*timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

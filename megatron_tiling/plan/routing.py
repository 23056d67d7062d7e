"""Rows of experts, which a router's values would say: as many on the fullest rank as is stated, alike for its experts.

Megatron reads them in few places. The all-to-all dispatcher counts rows in ``preprocess``; the all-gather dispatcher
copies its counts to the host, and selects probabilities by a mask, as its functions do that permute unfused, and as our
dispatchers that remember tokens do. Each of these gets counts here; all else of stock's runs.

A rank holds ``imbalance`` times what it would if all experts had the same, and sends as many rows as it has.
"""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.kernels import run

FLAG = "--expert-imbalance"
#: What it was given, for all runs of this process, if it was.
_given: list[float] = []


def stated() -> float:
    """Rows on the fullest rank of all runs of this process, relative to balanced ones: as given, or the default."""
    return _given[0] if _given else 1.0


@dataclass
class Routing:
    """Of the model that is planned.

    Args:
        imbalance: rows on the fullest rank, relative to balanced ones.
        experts, top_k: of a layer, in all; as the last dispatcher that was made has them.
    """

    imbalance: float
    experts: int = 0
    top_k: int = 0

    def rows(self, tokens: int, experts: int) -> int:
        """Of so many experts of one rank, or of all, with a stated number of tokens."""
        share = self.imbalance if experts < self.experts else 1.0
        return round(share * tokens * self.top_k * experts / self.experts)

    def read(self, config: Any, local_experts: int) -> None:
        """Of a layer.

        Raises:
            SystemExit: so many rows cannot be on one rank.
        """
        self.experts, self.top_k = config.num_moe_experts, config.moe_router_topk
        most = min(self.top_k, local_experts) * self.experts / (local_experts * self.top_k)
        if not 1 <= self.imbalance <= most:
            raise SystemExit(
                f"megatron_tiling plan: {FLAG} {self.imbalance:g}: with {local_experts} of {self.experts} experts on a "
                f"rank and {self.top_k} a token the fullest rank has 1 to {most:g} times the balanced rows"
            )


def evenly(total: int, *shape: int) -> np.ndarray:
    """Integers that differ by one at most, with this sum."""
    parts = math.prod(shape)
    return (total // parts + (np.arange(parts) < total % parts)).reshape(shape)


def reason_for_no_imbalance(args: Namespace) -> str:
    """Of Megatron's arguments: why no rows follow the number that was given, or nothing."""
    if not _given:
        return ""
    if not getattr(args, "num_experts", None):
        return f"{FLAG} {_given[0]:g}: the model has no experts; leave it out, or give --num-experts"
    if getattr(args, "moe_pad_expert_input_to_capacity", False):
        fixed = "--moe-pad-expert-input-to-capacity gives all experts as many rows"
        return f"{FLAG} {_given[0]:g}: {fixed}; leave one of them out"
    return ""


def install(imbalance: float | None = None) -> None:
    """Replace those places, in this process, once its tensors are fake ones. After megatron can be imported."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_tiling.resident.dispatch import RememberingDispatcher

    _given[:] = [] if imbalance is None else [imbalance]
    routing = Routing(stated())
    tensor: Any = Tensor
    tensor.masked_select = functools.partialmethod(_masked_select, routing, tensor.masked_select)
    _of_all_to_all(token_dispatcher.MoEAlltoAllTokenDispatcher, routing)
    _of_all_gather(token_dispatcher.MoEAllGatherTokenDispatcher, routing)
    RememberingDispatcher.is_known = True  # which it would find by comparing values
    tensor.is_set_to = _is_set_to


def _is_set_to(self: Tensor, tensor: Tensor) -> bool:
    """Fake tensors have no addresses, by which torch's own compares."""
    same = self.shape == tensor.shape and self.stride() == tensor.stride()
    offsets = self.storage_offset() == tensor.storage_offset()
    return same and offsets and self.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def _masked_select(self: Tensor, routing: Routing, stock: Callable[..., Any], mask: Tensor) -> Tensor:
    """``[experts, tokens]``. Keeps: both, as autograd does."""
    if not routing.experts:
        return stock(self, mask)

    def kernel(source: Tensor) -> Any:
        picked = source.new_empty(routing.rows(mask.shape[1], mask.shape[0]))
        return picked, (source, mask), lambda source, mask, grad: (torch.empty_like(source),)

    return run(kernel, self)


def _read(dispatcher: Any, routing: Routing) -> None:
    """When one is made."""
    stock = dispatcher.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        routing.read(self.config, self.num_local_experts)

    dispatcher.__init__ = init


def _of_all_to_all(dispatcher: Any, routing: Routing) -> None:
    _read(dispatcher, routing)
    stock = dispatcher.preprocess

    @functools.wraps(stock)
    def preprocess(self: Any, routing_map: Tensor) -> Any:
        stock(self, routing_map)
        ranks, experts, tokens = (self.tp_size, self.ep_size), self.num_local_experts, routing_map.shape[0]
        chunks = np.arange(self.num_experts * self.tp_size)
        self.sort_input_by_local_experts = chunks.reshape(-1, experts).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(experts, -1).T.ravel()
        if self.drop_and_pad:  # which takes as many of each expert, whatever the router says
            return np.full(experts, self.capacity * math.prod(ranks))
        received = evenly(routing.rows(tokens * self.ep_size, experts), self.ep_size, experts)
        received = np.broadcast_to(received, (self.tp_size, *received.shape))
        if math.prod(ranks) > 1:
            self.input_splits = evenly(tokens * routing.top_k, self.ep_size).tolist()
            self.output_splits = received[self.tp_rank].sum(1).tolist()
            self.output_splits_tp = received.sum((1, 2))
        if experts > 1:
            self.num_global_tokens_per_local_expert = received.reshape(-1, experts)
        return received.sum((0, 1))

    dispatcher.preprocess = preprocess


def _of_all_gather(dispatcher: Any, routing: Routing) -> None:
    _read(dispatcher, routing)
    stock: Callable[..., Any] = dispatcher.dispatch_postprocess

    @functools.wraps(stock)
    def dispatch_postprocess(self: Any, hidden_states: Tensor, probs: Tensor) -> Any:
        tensor: Any = Tensor
        stock_copy = tensor.cpu
        experts = self.num_local_experts
        tensor.cpu = lambda counts: evenly(routing.rows(hidden_states.shape[0], experts), experts)
        try:
            return stock(self, hidden_states, probs)
        finally:
            tensor.cpu = stock_copy

    dispatcher.dispatch_postprocess = dispatch_postprocess

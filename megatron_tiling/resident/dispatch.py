"""Token dispatchers that remember tokens as they were before they were permuted for the experts of one rank.

Where all tokens are local, every row that experts take is a copy of one. So tiled experts keep the tokens once, which
the router keeps anyway, and copy the rows of a tile again in the backward pass. A built dispatcher has its class set.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe import token_dispatcher as stock
from torch import Tensor

from megatron_tiling.log import log_on_rank_0
from megatron_tiling.tiles.experts import Source


class _Dispatch(NamedTuple):
    """One under way: tokens ``[t, h]``, routing map ``[t, experts]``, and the rows that the last step gave."""

    tokens: Tensor
    routing_map: Tensor
    rows: Tensor
    versions: tuple[int, int]

    def followed_by(self, rows: Tensor) -> "_Dispatch":
        return self._replace(rows=rows, versions=(self.versions[0], rows._version))

    def is_untouched(self, *given: Any) -> bool:
        """Whether these are the last step's rows, and neither they nor the tokens have been written to.

        A module with full backward hooks gets other tensors of the same memory, which share its version.
        """
        untouched = (self.tokens._version, self.rows._version) == self.versions
        return untouched and any(isinstance(one, Tensor) and one.is_set_to(self.rows) for one in given)


class RememberingDispatcher:
    """Put before the stock class. Each step must get what the one before gave: others may change rows in between.

    Attributes:
        remembered: the dispatch under way.
        is_known: whether ``source_of`` gives what experts get, which is looked at once.
    """

    remembered: _Dispatch | None = None
    is_known: bool | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        self.remembered, tokens = None, hidden_states.view(-1, hidden_states.shape[-1])
        result = super().dispatch_preprocess(hidden_states, routing_map, probs)  # type: ignore[misc]
        if torch.is_grad_enabled() and self.is_known is not False:
            rows = result[0]
            self.remembered = _Dispatch(tokens, routing_map, rows, (tokens._version, rows._version))
        return result

    def token_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(super().token_dispatch, *args, **kwargs)  # type: ignore[misc]

    def dispatch_postprocess(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(super().dispatch_postprocess, *args, **kwargs)  # type: ignore[misc]

    def _step(self, stock_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dispatch = self._recall(*args, *kwargs.values())
        result = stock_step(*args, **kwargs)
        if dispatch is not None:
            self.remembered = dispatch.followed_by(result[0])
        return result

    def _recall(self, *given: Any) -> _Dispatch | None:
        """The dispatch under way, if this is how it goes on."""
        dispatch, self.remembered = self.remembered, None
        if dispatch is None or dispatch.is_untouched(*given):
            return dispatch
        _say_kept_whole()
        return None

    @torch.no_grad()  # torch's checkpoint counts what autograd saves, and rows are compared once
    def source_of(self, permuted: Tensor) -> Source | None:
        """Where the rows that experts were given come from, ``[n, h]``, if that is known. To be asked once a dispatch.

        Rows are sorted by expert, and those of an expert as their tokens are.
        """
        dispatch = self._recall(permuted)
        if dispatch is None:
            return None
        tokens, routing_map = dispatch.tokens, dispatch.routing_map
        numbers = torch.arange(tokens.shape[0], device=tokens.device)
        indices = numbers.expand(routing_map.shape[1], -1).masked_select(routing_map.bool().t())
        if self.is_known is None and indices.numel():
            self.is_known = indices.shape[0] == permuted.shape[0] and all(
                torch.equal(tokens.index_select(0, some).view(torch.uint8), rows.view(torch.uint8))
                for some, rows in zip(indices.chunk(8), permuted.chunk(8), strict=True)
            )
            if not self.is_known:
                _say_kept_whole()
        known = self.is_known and indices.shape[0] == permuted.shape[0] and tokens.dtype == permuted.dtype
        return Source(tokens, indices) if known else None


@cache
def _say_kept_whole() -> None:
    """Once: the table has said otherwise."""
    log_on_rank_0("warning: experts are given other rows than copies of tokens in order: they are kept whole")


class RememberingAllGather(RememberingDispatcher, stock.MoEAllGatherTokenDispatcher):
    """``MoEAllGatherTokenDispatcher``, which remembers."""


class RememberingAlltoAll(RememberingDispatcher, stock.MoEAlltoAllTokenDispatcher):
    """``MoEAlltoAllTokenDispatcher``, which remembers."""


_CLASSES: dict[type, type[RememberingDispatcher]] = {
    stock.MoEAllGatherTokenDispatcher: RememberingAllGather,
    stock.MoEAlltoAllTokenDispatcher: RememberingAlltoAll,
}


def can_remember(dispatcher: Any) -> bool:
    """Whether a built stock dispatcher has all tokens at hand, and gives experts plain copies of them."""
    if type(dispatcher) not in _CLASSES or "dispatch_preprocess" in vars(dispatcher):
        return False
    config = dispatcher.config
    otherwise = (
        dispatcher.tp_size * dispatcher.ep_size > 1,
        config.moe_pad_expert_input_to_capacity,
        config.moe_apply_probs_on_input,
        config.overlap_moe_expert_parallel_comm,
        getattr(config, "cuda_graph_impl", None) not in (None, "none"),  # whose replays remember nothing
    )
    return not any(otherwise)


def remember(dispatcher: Any) -> RememberingDispatcher:
    """Make a dispatcher remember, in place, where ``can_remember``."""
    dispatcher.__class__ = _CLASSES[type(dispatcher)]
    remembering: RememberingDispatcher = dispatcher
    return remembering

"""Token dispatchers that remember tokens as they were before they were permuted for the experts of one rank.

Where all tokens are local, every row that experts take is a copy of one. So tiled experts keep the tokens once, which
the router keeps anyway, and copy the rows of a tile again in the backward pass. A built dispatcher has its class set.
"""

from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher as stock
from torch import Tensor

from megatron_tiling.log import log_on_rank_0
from megatron_tiling.tiles.experts import Source


class RememberingDispatcher:
    """Put before the stock class.

    Attributes:
        remembered: tokens ``[t, h]`` and routing map ``[t, experts]`` of the dispatch under way.
        is_known: whether ``source_of`` gives what experts get, which is looked at once.
    """

    remembered: tuple[Tensor, Tensor] | None = None
    is_known: bool | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
        self.remembered = hidden_states.view(-1, hidden_states.shape[-1]), routing_map
        return super().dispatch_preprocess(hidden_states, routing_map, probs)  # type: ignore[misc]

    def source_of(self, permuted: Tensor) -> Source | None:
        """Where the rows that experts were given come from, ``[n, h]``, if that is known. To be asked once a dispatch.

        Rows are sorted by expert, and those of an expert as their tokens are.
        """
        remembered, self.remembered = self.remembered, None
        if remembered is None or self.is_known is False or not torch.is_grad_enabled():
            return None
        tokens, routing_map = remembered
        numbers = torch.arange(tokens.shape[0], device=tokens.device)
        indices = numbers.expand(routing_map.shape[1], -1).masked_select(routing_map.bool().t())
        if self.is_known is None and indices.numel():
            self.is_known = indices.shape[0] == permuted.shape[0] and all(
                torch.equal(tokens.index_select(0, some).view(torch.uint8), rows.view(torch.uint8))
                for some, rows in zip(indices.chunk(8), permuted.chunk(8), strict=True)
            )
            if not self.is_known:
                log_on_rank_0(
                    "warning: experts are given other rows than copies of tokens in order: they are kept whole"
                )
        known = self.is_known and indices.shape[0] == permuted.shape[0] and tokens.dtype == permuted.dtype
        return Source(tokens, indices) if known else None


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

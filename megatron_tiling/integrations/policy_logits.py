"""Logits of a policy that are never made: what a tiled model returns to slime and miles, whose loss asks for scores.

These trainers take logits from the model's forward pass and hand them to one function of theirs, which computes
log-probabilities and entropies. ``defer_logits`` makes a model return ``PolicyLogits``, which know what stands between,
and ``hook_scores`` gives that function their scores, tile by tile. They are no tensor: other code that takes them for
one raises.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, NoReturn

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_tiling.integrations.settings import symbol
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.resident.layers import TiledColumnParallelLinear
from megatron_tiling.resident.lazy_logits import LazyLogits
from megatron_tiling.resident.lm_head import TiledOutputLayer, head_loop
from megatron_tiling.resident.score_processor import forward_of
from megatron_tiling.resident.stock_code import reason_for_whole_logits
from megatron_tiling.tiles.head import HeadScores, head_scores


@dataclass(repr=False, eq=False)
class PolicyLogits(LazyLogits):
    """Logits ``[s, 1, v]`` of one rank's columns of the vocabulary, and views of them as trainers take them.

    Args:
        make: computes them whole, ``[s, 1, v]``, in the hidden states' dtype.
        layout: ``sbv``, ``bsv`` or ``tv`` (``[tokens, v]``).
        rows: ``[n]`` int64 on the CPU, which tokens a ``tv`` view has, none twice; ``None`` is all.
        scored: log-probabilities that were computed, of all views.
    """

    make: Callable[[], Tensor] = field(kw_only=True)
    layout: str = "sbv"
    rows: Tensor | None = None
    scored: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        shards = 1 if self.loop.comm is None else self.loop.comm.shards
        tokens = self.hidden.shape[0] * shards if self.rows is None else len(self.rows)
        sizes = {"s": tokens, "b": 1, "t": tokens, "v": len(self.weight)}
        return torch.Size(sizes[letter] for letter in self.layout)

    @property
    def dtype(self) -> torch.dtype:
        """That of logits, which Megatron's ``Float16Module`` makes float32."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> PolicyLogits:
        return self

    def transpose(self, first: int, second: int) -> PolicyLogits:
        if self.layout != "sbv" or {first, second} != {0, 1}:
            self._refuse("transpose", first, second)
        return replace(self, layout="bsv")

    def squeeze(self, dim: int) -> PolicyLogits:
        if self.layout != "bsv" or dim != 0:
            self._refuse("squeeze", dim)
        return replace(self, layout="tv")

    def view(self, *shape: int) -> PolicyLogits:
        if self.layout != "bsv" or shape != (-1, len(self.weight)):
            self._refuse("view", *shape)
        return replace(self, layout="tv")

    def div(self, temperature: float) -> PolicyLogits:
        scale = self.loop.scale
        scale = replace(scale, temperature=scale.temperature * temperature)
        return replace(self, loop=replace(self.loop, scale=scale))

    __truediv__ = div

    def __getitem__(self, tokens: slice) -> PolicyLogits:
        if self.layout != "tv" or not isinstance(tokens, slice):
            self._refuse("index", tokens)
        self._communicate_once()
        rows = torch.arange(self.shape[0]) if self.rows is None else self.rows
        return replace(self, rows=rows[tokens])

    def _communicate_once(self) -> None:
        """However many views are scored, the input is gathered and its gradient reduced once."""
        comm = self.loop.comm
        if comm is not None:
            if comm.sequence_parallel:
                self.hidden = gather_from_sequence_parallel_region(self.hidden, group=comm.group)
            elif comm.allreduce_dgrad:
                self.hidden = copy_to_tensor_model_parallel_region(self.hidden, group=comm.group)
            self.loop = replace(self.loop, comm=None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        views: Any = args[0] if args else ()
        if func is torch.cat and kwargs == {"dim": 0} and all(isinstance(view, cls) for view in views):
            first = views[0]
            if all(view.hidden is first.hidden and view.loop == first.loop for view in views):
                rows = torch.cat([view.rows for view in views])
                if len(rows.unique()) == len(rows):
                    return replace(first, rows=rows)
        return cls._refuse(getattr(func, "__name__", func))

    def sum(self) -> _OnlyTimesZero:
        """For ``0 * logits.sum()``, with which these losses reach every parameter."""
        return _OnlyTimesZero(self)

    def scores(self, tokens: Tensor, entropy: bool) -> HeadScores:
        """Log-probabilities ``[n, 1]`` of ``tokens`` ``[n]``, and entropies ``[n]``."""
        rows = None if self.rows is None else self.rows.to(self.device)
        scores = head_scores(self.hidden, self.weight, tokens.reshape(-1, 1), replace(self.loop, entropy=entropy), rows)
        self.scored.append(scores.log_probs)
        return scores

    def whole(self) -> Tensor:
        """The logits, made: ``[n, v]``, for a ``tv`` view."""
        logits: Tensor = self.loop.scale(self.make().to(self.dtype)).squeeze(1)
        return logits if self.rows is None else logits[self.rows]


class _OnlyTimesZero:
    def __init__(self, logits: PolicyLogits) -> None:
        self.logits = logits

    def __rmul__(self, factor: float) -> Tensor:
        if factor != 0:
            self.logits._refuse("sum")
        if not self.logits.scored:
            row = torch.zeros(1, dtype=torch.long)
            replace(self.logits, rows=row).scores(row.to(self.logits.device), entropy=False)
        return 0 * self.logits.scored[-1].sum()

    def __getattr__(self, name: str) -> NoReturn:
        self.logits._refuse("sum", name)


def defer_logits(model: Any) -> str:
    """Make a model return ``PolicyLogits`` where it would return logits of one sequence; in place.

    With labels, for generation, for batches of several sequences, where a critic's output layer has taken the tiled
    one's place, or where anybody looks at logits, its forward pass stays what it is.

    Returns:
        Why logits stay whole, or ``""``.
    """
    if type(getattr(model, "output_layer", None)) is not TiledOutputLayer:
        return "the output layer is not tiled, or its pipeline stage is another"
    if model.config.mtp_num_layers:
        return "prediction heads look at logits"
    if "forward" in vars(model):
        return "the model has a forward pass of its own"
    model.forward = MethodType(_deferring(type(model).forward), model)
    return ""


@functools.cache
def _deferring(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``forward`` that makes no logits where nobody looks at them."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(model, *args, **kwargs).arguments
        layer, tokens = model.output_layer, given.get("input_ids")
        asked_for = ("labels", "inference_context", "inference_params", "runtime_gather_output", "output_processor")
        if (
            any(given.get(name) is not None for name in asked_for)
            or tokens is None
            or tokens.shape[0] != 1
            or type(layer) is not TiledOutputLayer
            or layer.makes_logits(tokens.device)
            or reason_for_whole_logits(model)
        ):
            return stock(model, *args, **kwargs)
        with forward_of(layer, functools.partial(_logits_of, layer)):
            return stock(model, *args, **kwargs)

    return forward


def _logits_of(
    layer: TiledOutputLayer, input_: Tensor, weight: Tensor | None = None, **unused: Any
) -> tuple[PolicyLogits, None]:
    """In place of an output layer's ``forward``."""

    def make() -> Tensor:
        made: Tensor = TiledColumnParallelLinear.forward(layer, input_, weight=weight)[0]
        return made

    used = layer.weight if weight is None else weight
    return PolicyLogits(input_, used, head_loop(layer, layer.head_tiles), make=make), None


def hook_scores(module: str, tested: str, entropy_gradient: str, whole_with: Sequence[str]) -> None:
    """Hook ``calculate_log_probs_and_entropy`` in the module that calls it, once.

    Args:
        module: of the trainer.
        tested: versions, for errors.
        entropy_gradient: the argument that says whether entropies carry a gradient.
        whole_with: arguments with which the logits are made and the trainer's own function is called.

    Raises:
        ImportError: the trainer has moved the function, or it takes other arguments.
    """
    name = "calculate_log_probs_and_entropy"
    stock = symbol(module, name, tested)
    if hasattr(stock, "takes_policy_logits"):
        return
    signature = inspect.signature(stock)
    if missing := {"logits", "tokens", "with_entropy", entropy_gradient, *whole_with} - signature.parameters.keys():
        raise ImportError(f"{module}.{name} takes no {', '.join(sorted(missing))}; it was tested with {tested}")

    @functools.wraps(stock)
    def calculate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        logits = given["logits"]
        if not isinstance(logits, PolicyLogits):
            return stock(*args, **kwargs)
        if any(given[one] is not None for one in whole_with):
            given["logits"] = logits.whole()
            return stock(*bound.args, **bound.kwargs)
        if not logits.size(0):
            nothing = torch.zeros(0, dtype=logits.dtype, device=logits.device)
            return nothing, nothing if given["with_entropy"] else None
        scores = logits.scores(given["tokens"], given["with_entropy"])
        entropy = scores.entropy
        if entropy is not None and not given[entropy_gradient]:
            entropy = entropy.detach()
        return scores.log_probs, entropy

    calculate.takes_policy_logits = True  # type: ignore[attr-defined]
    setattr(importlib.import_module(module), name, calculate)
    log_on_rank_0(f"{module}.{name} takes log-probabilities and entropies from tiles of logits")

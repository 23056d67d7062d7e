"""Logits that are not made until somebody looks at them.

``LazyLogits`` is what a tiled output layer returns: a tensor without memory, with its place in the autograd graph.
The tiled cross entropy takes hidden states and weight from it and never makes the logits. Every other operation makes
them first, as the dense layer would have, and their gradient flows back through the dense layer's backward pass.

The values are made below autograd, in ``__torch_dispatch__``: autograd functions, hooks, views and in-place operations
work as on any tensor. Hazard: C++ code that reads a tensor's memory without dispatching an operation finds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megatron_tiling.tiles.head import CrossEntropyLoop, TokenLosses, tiled_linear_cross_entropy
from megatron_tiling.tiles.linear import TileLoop, _TiledLinear, tiled_linear

_aten = torch.ops.aten
_SCALINGS = (_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar)


@dataclass
class _Source:
    """Where lazy logits come from.

    Args:
        hidden, weight: the output layer's input and its weight, in the autograd graph.
        loop: how to compute their cross entropy, ``loop.scale`` included.
        make: computes the logits without recording gradients.
        losses: of the last call of ``LazyLogits.cross_entropy``, for their largest logits.
    """

    hidden: Tensor
    weight: Tensor
    loop: CrossEntropyLoop
    make: Callable[[], Tensor]
    value: Tensor | None = None
    losses: TokenLosses | None = None


class LazyLogits(Tensor):
    """Logits ``[s, b, v]`` of one rank's columns of the vocabulary; see the module's docstring.

    Products with numbers stay lazy. So do the largest logits and their columns (``max`` and ``argmax`` over the
    last dimension), which multi-token prediction asks for, once the cross entropy has been computed with
    ``keep_largest``.
    """

    _source: _Source
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor) -> LazyLogits:
        logits: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        return logits

    def __init__(self, *unused: Any) -> None: ...

    @property
    def pending(self) -> bool:
        """Whether nobody has looked at the logits, nor changed them."""
        return self._source.value is None

    def value(self) -> Tensor:
        """The logits outside the autograd graph, made at the first call and kept."""
        if self._source.value is None:
            self._source.value = self._source.make()
        return self._source.value

    def dense(self) -> Tensor:
        """The logits as an ordinary tensor in the autograd graph."""
        logits: Tensor = _aten.alias(self)
        return logits

    def cross_entropy(self, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Loss of each token, ``[s, b]`` for labels ``[s, b]``, without making the logits."""
        source = self._source
        loop = replace(source.loop, label_smoothing=label_smoothing)
        source.losses = tiled_linear_cross_entropy(source.hidden, source.weight, labels, loop)
        return source.losses.loss

    def data_ptr(self) -> int:  # Triton's launcher asks for it
        return self.value().data_ptr()

    def tolist(self) -> Any:
        return self.value().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, pending={self.pending})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first.pending:
            if func in _SCALINGS and isinstance(args[1], (int, float)):
                return first._scaled(func, args[1])
            known = first._largest(func, args[1:], kwargs or {})
            if known is not None:
                return known
        made = {id(lazy.value()): lazy for lazy in _lazy_in((args, kwargs))}
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.value, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return made.get(id(result), result)  # an in-place operation returns the tensor that it was given

    def _scaled(self, func: Any, number: float) -> LazyLogits:
        source = self._source
        scale = source.loop.scale * number if func in _SCALINGS[:2] else source.loop.scale / number
        scaled = LazyLogits(self.shape, self)
        scaled._source = _Source(
            source.hidden, source.weight, replace(source.loop, scale=scale), lambda: func(source.make(), number)
        )
        return scaled

    def _largest(self, func: Any, rest: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """``max`` or ``argmax`` over the vocabulary where the cross entropy has found them already."""
        losses = self._source.losses
        if losses is None or losses.argmax is None or options or rest not in ((-1,), (self.dim() - 1,)):
            return None
        if func is _aten.max.dim:
            return losses.largest, losses.argmax
        return losses.argmax if func is _aten.argmax.default else None


def lazy_linear(hidden: Tensor, weight: Tensor, linear: TileLoop, loop: CrossEntropyLoop) -> LazyLogits:
    """What ``tiled_linear(hidden, weight, None, linear)`` would return, lazily.

    Args:
        hidden: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism.
        weight: ``[v, h]``.
        linear: how to make the logits, if need be.
        loop: how to compute their cross entropy.
    """
    logits: LazyLogits = _LazyLinear.apply(weight, None, linear, hidden)

    @torch.no_grad()
    def make() -> Tensor:
        made = tiled_linear(hidden, weight, None, linear)
        assert isinstance(made, Tensor)
        return made

    logits._source = _Source(hidden, weight, loop, make)
    return logits


class _LazyLinear(_TiledLinear):
    """``_TiledLinear`` whose forward pass computes nothing; its backward pass serves made logits."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: None, loop: TileLoop, hidden: Tensor) -> LazyLogits:  # type: ignore[override]
        needs_wgrad, _, _, needs_dgrad = ctx.needs_input_grad
        ctx.loop = loop
        ctx.param = weight if needs_wgrad else None
        ctx.save_for_backward(weight if needs_dgrad else None, *((hidden,) if needs_wgrad else ()))
        gathers = loop.comm is not None and loop.comm.sequence_parallel
        tokens = hidden.shape[0] * (loop.comm.group.size() if gathers else 1)  # type: ignore[union-attr]
        return LazyLogits((tokens, *hidden.shape[1:-1], weight.shape[0]), hidden)


def _lazy_in(arguments: Any) -> list[LazyLogits]:
    found: list[LazyLogits] = []
    tree_map_only(LazyLogits, found.append, arguments)
    return found

"""A tensor that autograd functions do not keep for their backward pass, but make again.

The input that a column layer's tiles share is gathered again under sequence parallelism, as Megatron's layers do; the
output of a norm is computed again, as with Megatron's ``layernorm`` recompute. Depends on torch alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def made_again(made: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> Iterator[None]:
    """While autograd functions that run here save ``made``, or views of it, keep ``source`` in its place.

    It is made once for all of them, when the first needs it in the backward pass, and dropped after the last.

    Args:
        made: ``function(source)``, with a storage of its own; or ``source``, of which nothing is made.
        function: gives the same values whenever it is called; runs without gradients.
        source: what is kept.

    Raises:
        RuntimeError: in the backward pass, ``source`` has been changed in place since, as autograd raises for what
            it saved.
    """
    if made is source or source.is_inference():  # which no graph keeps, and which counts no versions
        yield
        return
    source, uses, left = source.detach(), 0, 0
    version, again = source._version, None
    storage, kind, empty = made.untyped_storage()._cdata, type(made), made.numel() == 0
    del made  # the functions below live as long as the graph

    def keep(saved: Tensor) -> Any:
        nonlocal uses
        if empty or type(saved) is not kind or saved.untyped_storage()._cdata != storage:
            return saved  # also what has no storage to compare: quantized weights
        uses += 1
        return saved.size(), saved.stride(), saved.storage_offset()

    def give(kept: Any) -> Tensor:
        nonlocal again, left
        if isinstance(kept, Tensor):
            return kept
        if source._version != version:
            raise RuntimeError("what a tiled layer's input is made from was modified by an inplace operation")
        if again is None:
            with torch.no_grad():
                again, left = function(source), uses
        view = again.as_strided(*kept)
        left -= 1
        if left == 0:
            again = None
        return view

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield

"""A tensor that autograd functions do not keep for their backward pass, but make again.

Megatron's ``layernorm`` recompute does this for norms that are modules of a layer; TransformerEngine's fused norms
are none, and stand alone once their linear layer is tiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def made_again(made: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> Iterator[None]:
    """While autograd functions that run here save ``made``, keep ``source`` in its place.

    Args:
        made: ``function(source)``.
        function: gives the same values whenever it is called; runs without gradients.
        source: what is kept anyway, by the backward pass of ``function``.

    Raises:
        RuntimeError: in the backward pass, ``source`` has been changed in place since, as autograd raises for what
            it saved.
    """
    address, shape, source = made.data_ptr(), made.shape, source.detach()
    version = source._version

    def keep(saved: Tensor) -> Any:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def give(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        if source._version != version:
            raise RuntimeError("the input of a norm that is computed again has been modified by an inplace operation")
        with torch.no_grad():
            return function(source)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield

"""Backward passes that have none of their own. Depends on torch alone."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order[T: Callable[..., Any]](backward: T) -> T:
    """A backward pass that refuses ``create_graph=True``, also where no gradient of a gradient is asked for.

    torch's ``once_differentiable`` alone raises only where its own operands need gradients; where the input or the
    weight does, and other layers have second derivatives, their sum would lack this layer's.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "tiles have no second derivatives, and this backward pass has create_graph=True; leave the layer "
                "dense, out of --tiled-linear-modules"
            )
        return once_differentiable(backward)(ctx, *grads)

    return run  # type: ignore[return-value]

"""What the tile loops of an MLP have in common, in bf16 (``mlp.py``) and in FP8. Depends on torch alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.activation import Activation

TOKEN_MULTIPLE = 256  # tokens of a forward step, which fill a GPU's blocks
NO_SECOND_PASS = (
    "a second backward pass through a TiledMLP whose fc1 is frozen, after the first one used up the kept "
    "pre-activations: give --tiled-mlp-keep 0 with retain_graph=True"
)


@dataclass(frozen=True)
class MLPTiles:
    """The tiles of an MLP.

    Args:
        parts: boundaries ``(0, ..., f)`` of the tiles over the rank's intermediate features; for a gated linear unit
            fc1's tile has these features of gate and of up.
        activation: between fc1 and fc2.
        keep: the first so many tiles keep their pre-activations for the backward pass.
        fp32_accumulate: sum over tiles in float32.
    """

    parts: Sequence[int]
    activation: Activation
    keep: int
    fp32_accumulate: bool = False

    @cached_property
    def tiles(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(self.parts)]

    def token_steps(self, tokens: int) -> list[slice]:
        """The tokens of each step of the forward pass: as many steps as tiles, or fewer for few tokens."""
        size = max(1, -(-tokens // (len(self.tiles) * TOKEN_MULTIPLE))) * TOKEN_MULTIPLE
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def scale_of(scale: Tensor | None, tokens: slice) -> Tensor | None:
    """``[n]`` in any shape -> ``[m]``."""
    return None if scale is None else scale.reshape(-1)[tokens]


class ActivationBackward:
    """The activation in a backward pass, tile by tile, and the gradients of fc1's bias and of the scale.

    Args:
        tiles: the tiles, and the activation.
        bias, scale: ``[halves * f]``, and a factor for every token, or ``None``.
        needs_grad, needs_bias, needs_scale: which gradients are needed, the first that of the pre-activation.
    """

    def __init__(
        self,
        tiles: MLPTiles,
        bias: Tensor | None,
        scale: Tensor | None,
        needs_grad: bool,
        needs_bias: bool,
        needs_scale: bool,
    ) -> None:
        self._tiles, self._bias, self._scale, self._needs_grad = tiles, bias, scale, needs_grad
        self._needs: Any = {"bias_grad": needs_bias, "scale_grad": needs_scale}
        self.bias_grad = torch.empty_like(bias) if bias is not None and needs_bias else None
        self._scale_grad: Tensor | None = None

    def through_tile(
        self,
        tile: slice,
        pre: Tensor,
        grad: Tensor,
        amax: Tensor | None = None,
        fp8: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """In place: ``pre`` becomes its gradient and ``grad`` the activation; ``Activation`` says the rest."""
        activation = self._tiles.activation
        operands = activation.bias_of(self._bias, tile), scale_of(self._scale, slice(None)), grad
        if not self._needs_grad:
            activation.forward([pre], *operands)
            return
        bias_grad, scale_grad = activation.backward(pre, *operands, amax, fp8, **self._needs)
        if bias_grad is not None and self.bias_grad is not None:
            activation.halved(self.bias_grad)[:, tile] = bias_grad
        if scale_grad is not None:
            self._scale_grad = scale_grad if self._scale_grad is None else self._scale_grad.add_(scale_grad)

    @property
    def scale_grad(self) -> Tensor | None:
        if self._scale is None or self._scale_grad is None:
            return None
        return self._scale_grad.to(self._scale.dtype).view_as(self._scale)

"""Activations of the tile loop, forward and backward, into buffers that exist.

An ``Activation`` is a function of torch, which is the reference and what runs on a CPU, and where one of the kernels
of ``tiles/kernels/activation.py`` computes the same, its formula. Depends on torch alone; ``resident/mlp.py`` says
which activation a Megatron MLP has.

Shapes: ``pre [halves, n, f]`` is the pre-activation of ``f`` features for ``n`` tokens, ``halves`` 2 for a gated
linear unit (gate and up) and 1 otherwise; ``bias [halves, f]``; ``scale [n]`` multiplies a token's activation.
Tensors may be strided views whose last dimension is dense. ``amax [1]`` (float32), where it is given, rises to the
largest absolute value of what is made for a product in FP8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tiling.tiles.device import has_kernels


@dataclass(frozen=True)
class Formula:
    """What a kernel computes: ``kind(min(gate, clamp)) * (clip(up, -clamp, clamp) + linear_offset)``, or ``kind(x)``.

    ``gelu`` is exact, ``gelu_tanh`` the approximation of Megatron's fused functions.
    """

    kind: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu"]
    clamp: float | None = None
    linear_offset: float = 0.0


@dataclass(frozen=True)
class Activation:
    """An activation with bias and scale.

    Args:
        gated: a gated linear unit: two halves in, one out.
        function: ``(pre [n, halves * f], bias [halves * f] or None, scale [n] or None) -> [n, f]``, differentiable.
        formula: the same function for GPU kernels, or ``None`` where there is no such kernel.
    """

    gated: bool
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    formula: Formula | None = None

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    def halved(self, joined: Tensor) -> Tensor:
        """``[..., halves * f]`` -> ``[halves, ..., f]``, a view."""
        return joined.unflatten(-1, (self.halves, -1)).movedim(-2, 0)

    def bias_of(self, bias: Tensor | None, columns: slice = slice(None)) -> Tensor | None:
        """``[halves * f]`` -> ``[halves, width]``, a view."""
        return None if bias is None else self.halved(bias)[:, columns]

    def forward(
        self,
        parts: Sequence[Tensor],
        bias: Tensor | None,
        scale: Tensor | None,
        out: Tensor,
        amax: Tensor | None = None,
    ) -> None:
        """Write the activation into ``out [n, f]``; ``amax`` is of it.

        ``pre`` comes in parts ``[halves, n, f_i]`` of neighbouring features, which one kernel takes together.
        """
        if formula := self._formula_of_kernels(parts[0]):
            from megatron_tiling.tiles.kernels.activation import activate

            activate(parts, bias, scale, out, amax=amax, **formula)
        else:
            start = 0
            for pre in parts:
                columns = slice(start, start := start + pre.shape[2])
                of_part = out[:, columns]
                of_part.copy_(self.function(_joined(pre), None if bias is None else _joined(bias[:, columns]), scale))
                _raise(amax, of_part)

    def backward(
        self,
        pre: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        grad: Tensor,
        amax: Tensor | None = None,
        fp8: tuple[Tensor, Tensor] | None = None,
        *,
        bias_grad: bool,
        scale_grad: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """In place: ``pre`` becomes its own gradient, and ``grad``, the activation's gradient, the activation.

        ``amax`` is of the gradient. With ``fp8``, ``[f, n]`` in FP8 and a scale ``[1]``, the activation goes there,
        scaled and transposed, in place of ``grad``.

        Returns:
            The gradients of ``bias [halves, f]`` and ``scale [n]``, each only if asked for.
        """
        if formula := self._formula_of_kernels(pre):
            from megatron_tiling.tiles.kernels.activation import activate_backward

            formula |= {"bias_grad": bias_grad, "scale_grad": scale_grad, "amax": amax, "fp8": fp8}
            return activate_backward(pre, bias, scale, grad, **formula)
        leaves = {"pre": _joined(pre).requires_grad_()}
        if bias is not None:
            leaves["bias"] = _joined(bias).requires_grad_(bias_grad)
        if scale is not None:
            leaves["scale"] = scale.detach().requires_grad_(scale_grad)
        with torch.enable_grad():
            out = self.function(leaves["pre"], leaves.get("bias"), leaves.get("scale"))
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        grads = dict(zip(wanted, torch.autograd.grad(out, [leaves[name] for name in wanted], grad), strict=True))
        pre.copy_(self.halved(grads["pre"]))
        _raise(amax, pre)
        if fp8 is None:
            grad.copy_(out.detach())
        else:
            into, fp8_scale = fp8
            largest = torch.finfo(into.dtype).max
            into.copy_((out.detach().float() * fp8_scale).clamp(-largest, largest).t())
        return self.halved(grads["bias"]) if bias_grad else None, grads.get("scale")

    def _formula_of_kernels(self, pre: Tensor) -> dict[str, Any]:
        """As keywords of the kernels, if there is one for this device and dtype."""
        return dict(vars(self.formula)) if self.formula and has_kernels(pre) else {}


def _raise(amax: Tensor | None, values: Tensor) -> None:
    if amax is not None and values.numel():
        amax.copy_(torch.maximum(amax, values.abs().amax()))


def _joined(halves: Tensor) -> Tensor:
    """``[halves, ..., f]`` -> a new ``[..., halves * f]``."""
    return torch.cat(halves.detach().unbind(0), dim=-1)

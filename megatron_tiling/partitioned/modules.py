"""Tiles as modules that own their weights, for engines that partition parameters (ZeRO-3, FSDP).

Such an engine gathers a module's parameters around its forward call, and again around the backward pass of what it
returned. So each tile is one module, called once a forward pass, whose work is one autograd function.

Hazard: an engine swaps a parameter's data or frees its storage between the two passes. So the parameter is kept, and
read again in the backward pass; a saved tensor would keep the gathered weight alive, or be empty.

Depends on torch alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.comm import flat
from megatron_tiling.tiles.mlp import MLPLoop, tiled_mlp
from megatron_tiling.tiles.ownership import copy_param, whole_shape
from megatron_tiling.tiles.tiled_linear import TiledLinearReturnBias


class _TileModule(torch.nn.Module):
    """A module with tiles of weights: loaded with the dense weight they are part of, or by their own keys."""

    weight_names: tuple[str, ...] = ("weight",)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self.weight_names:
            value, tile = state_dict.get(prefix + name), getattr(self, name)
            if value is None or value.numel() == 0:  # ZeRO-3 saves nothing for what it has partitioned
                continue
            if tuple(value.shape) != tuple(whole_shape(tile)):
                error_msgs.append(f"{prefix}{name}: cannot load {list(value.shape)} into {list(whole_shape(tile))}")
            else:
                with torch.no_grad():
                    copy_param(tile, value)


class WeightTile(_TileModule):
    """One tile of a layer's weight. The bias, if any, is the layer's.

    Args:
        weight: ``[out_o, in_i]``; for a paired tile the gate's rows above the up's.
    """

    def __init__(self, weight: Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """``[..., in_i]`` -> ``[..., out_o]``, and no bias."""
        return tile_product(input_, self.weight), None

    def extra_repr(self) -> str:
        return "in_features={1}, out_features={0}".format(*whole_shape(self.weight))


class PartitionedTiles(TiledLinearReturnBias):
    """The tiles of one layer, cut by its grid; what gathers tiles tells them from a ``TiledLinear`` of the user's."""


class PairedTiles(PartitionedTiles):
    """Out-tiles ``[gate_o | up_o]``, joined as ``[gate | up]``."""

    def _combine_output_splits(self, outputs: Iterable[tuple[Tensor, None]]) -> tuple[Tensor, None]:
        gates, ups = zip(*(output.chunk(2, dim=-1) for output, _ in outputs), strict=True)
        return torch.cat((*gates, *ups), dim=-1), None


def tile_product(input_: Tensor, weight: Parameter) -> Tensor:
    """``[..., in_i]`` and ``[out_o, in_i]`` -> ``input_ @ weight.T`` in the dtype of input or autocast."""
    output: Tensor = _TileProduct.apply(autocast(input_), weight)
    return output


def autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast asks for, if it is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class _TileProduct(torch.autograd.Function):
    """The product of one tile. Tokens ``n`` = all dimensions but the last.

    =======  ==========================================  ===========================
    forward  x ``[n, in_i]``, W ``[out_o, in_i]``         y ``[n, out_o]`` = x W^T
    dgrad    dy ``[n, out_o]``, W                         dx ``[n, in_i]`` = dy W
    wgrad    dy, x                                        dW ``[out_o, in_i]`` = dy^T x
    =======  ==========================================  ===========================
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Parameter) -> Tensor:
        _, needs_wgrad = ctx.needs_input_grad
        ctx.weight = weight
        ctx.save_for_backward(input_ if needs_wgrad else None)
        output = flat(input_) @ weight.to(input_.dtype).t()
        return output.view(*input_.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (input_,) = ctx.saved_tensors
        weight: Parameter = ctx.weight
        needs_dgrad, needs_wgrad = ctx.needs_input_grad
        dy = flat(grad_output)
        dgrad = wgrad = None
        if needs_dgrad:
            dgrad = dy @ weight.to(dy.dtype)
            dgrad = dgrad.view(*grad_output.shape[:-1], dgrad.shape[-1])
        if needs_wgrad:
            wgrad = (dy.t() @ flat(input_)).to(weight.dtype)
        return dgrad, wgrad


class MLPTile(_TileModule):
    """Tile i of fc1 and tile i of fc2, gathered together: once forward and once backward.

    Args:
        fc1: ``[halves * f_i, h]``, of a gated linear unit the gate's rows above the up's.
        fc2: ``[h_out, f_i]``.
    """

    weight_names = ("fc1", "fc2")

    def __init__(self, fc1: Parameter, fc2: Parameter) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2

    def forward(
        self,
        input_: Tensor,
        *,
        activation: Activation | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        keep: bool = False,
        part: str = "",
    ) -> Tensor:
        """``scale * activation(input_ @ fc1.T + bias) @ fc2.T``, or the product with one ``part``.

        Args:
            input_: ``[..., h]``; ``[..., f_i]`` for ``part="fc2"``.
            activation: between fc1 and fc2.
            bias: ``[halves, f_i]``, of fc1.
            scale: ``[n]``, a factor for every token.
            keep: keep the pre-activation for the backward pass, instead of computing it again.
            part: ``"fc1"`` or ``"fc2"``, for layers that are called one by one.
        """
        if part:
            return tile_product(input_, getattr(self, part))
        assert activation is not None
        loop = MLPLoop((0, self.fc2.shape[1]), activation, int(keep), saves_weights=False)
        return tiled_mlp(input_, self.fc1, None if bias is None else bias.flatten(), self.fc2, scale, loop)


class MLPTilePart(_TileModule):
    """A layer's tile whose weight is in an ``MLPTile``: stands in the layer's grid, and owns nothing."""

    def __init__(self, unit: MLPTile, part: str) -> None:
        super().__init__()
        self._unit, self._part = (unit,), part  # in a tuple: not a submodule
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Parameter:
        parameter: Parameter = getattr(self._unit[0], self._part)
        return parameter

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return self._unit[0](input_, part=self._part), None


#: The modules that an engine gathers as one.
TILE_MODULES = (WeightTile, MLPTile)


def tile_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The tiles in a model, those of fc1 and fc2 in a tiled MLP two by two."""
    return [module for module in model.modules() if isinstance(module, TILE_MODULES)]

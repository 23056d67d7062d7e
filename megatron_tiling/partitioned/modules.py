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
from torch.nn import Parameter

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.linear import TileLoop, tiled_linear
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
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        for name in self.weight_names:
            value, tile = state_dict.get(prefix + name), getattr(self, name)
            if value is None or value.numel() == 0:  # ZeRO-3 saves nothing for what it has partitioned
                continue
            if tuple(value.shape) != tuple(whole_shape(tile)):
                errors.append(f"{prefix}{name}: cannot load {list(value.shape)} into {list(whole_shape(tile))}")
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
    out_features, in_features = weight.shape
    output = tiled_linear(input_, weight, None, TileLoop(TileGrid(in_features, out_features), saves_weight=False))
    assert isinstance(output, Tensor)
    return output


class MLPTile(_TileModule):
    """Tile i of fc1 and tile i of fc2, gathered together: once forward and once backward.

    Args:
        fc1: ``[halves * f_i, h]``, of a gated linear unit the gate's rows above the up's.
        fc2: ``[h_out, f_i]``.
    """

    weight_names = ("fc1", "fc2")

    def __init__(self, fc1: Parameter, fc2: Parameter) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

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

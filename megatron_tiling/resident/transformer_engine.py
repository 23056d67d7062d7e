"""TransformerEngine's linear layers as tiled ones, for models of ``--transformer-impl transformer_engine``.

A local layer becomes tiled in place. A TransformerEngine layer cannot: its class brings kernels, quantisation and
communication of its own. So a new layer is built around the same parameter objects, which are neither drawn nor
copied, and takes the old one's place. Its state dict has TransformerEngine's keys, in its order.

TELayerNormColumnParallelLinear becomes a tiled column layer with a TENorm before it, which normalizes with the
``layer_norm_weight`` (and ``layer_norm_bias``) that stay this layer's own parameters. TENorm and
TEDotProductAttention stay; TELinear and the grouped GEMMs of experts stay dense.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from torch import Tensor

from megatron_tiling.arguments import REFUSED, refuse
from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear


class _KeepsExtraState:
    """``_extra_state`` as TransformerEngine saves it.

    Without FP8 that is an empty tensor. What a checkpoint of an FP8 run holds there means nothing to a tiled layer,
    and is saved again as it was loaded.
    """

    _te_state: Any = None

    def get_extra_state(self) -> Any:
        return torch.empty(0, dtype=torch.uint8) if self._te_state is None else self._te_state

    def set_extra_state(self, state: Any) -> None:
        self._te_state = state


class TiledTEColumnParallelLinear(_KeepsExtraState, TiledColumnParallelLinear):
    """What a ``TEColumnParallelLinear`` becomes; see ``rebuilt``."""


class TiledTERowParallelLinear(_KeepsExtraState, TiledRowParallelLinear):
    """What a ``TERowParallelLinear`` becomes; see ``rebuilt``."""


class TiledTELayerNormColumnParallelLinear(_KeepsExtraState, TiledColumnParallelLinear):
    """What a ``TELayerNormColumnParallelLinear`` becomes; see ``rebuilt``.

    The norm is no submodule: this layer owns its parameters, under TransformerEngine's names.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None

    def set_norm(self, norm: torch.nn.Module) -> None:
        """The norm to put before the tiles; its parameters are replaced by this layer's at each use."""
        self._norm = (norm,)  # in a tuple: not a submodule

    def normalized(self, input_: Tensor) -> Tensor:
        norm: Any = self._norm[0]
        if norm.weight is not self.layer_norm_weight:  # the first use, or after a parameter was replaced
            norm.weight = self.layer_norm_weight
        if self.layer_norm_bias is not None and norm.bias is not self.layer_norm_bias:
            norm.bias = self.layer_norm_bias
        output: Tensor = norm(input_)
        return output


#: The layers that are rebuilt; none where TransformerEngine is not installed.
TILED_CLASSES: dict[type, type[TiledColumnParallelLinear] | type[TiledRowParallelLinear]] = (
    {
        te.TEColumnParallelLinear: TiledTEColumnParallelLinear,
        te.TERowParallelLinear: TiledTERowParallelLinear,
        te.TELayerNormColumnParallelLinear: TiledTELayerNormColumnParallelLinear,
    }
    if te.HAVE_TE
    else {}
)


def reason_to_stay_dense(layer: Any) -> str:
    """Why one of these layers cannot be rebuilt though its model can be tiled, or nothing."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has hooks, which a new layer would lose"
    return ""


def rebuilt(dense: Any) -> TiledColumnParallelLinear | TiledRowParallelLinear:
    """A tiled layer around a TransformerEngine layer's parameters, as one tile yet; ``set_tiles`` chooses the grid.

    Args:
        dense: one of ``TILED_CLASSES``, on any device. Not to be used any more.

    Returns:
        A layer with the same parameter objects in the same order, and the same state dict.

    Raises:
        ValueError: the model's config asks for what a tiled layer cannot do, naming the flag.
    """
    refuse(dense.config, REFUSED["tiled layers of TransformerEngine"])
    tiled_class = TILED_CLASSES[type(dense)]
    ranks = dense._tp_group.size()
    rows, columns = dense.weight.shape
    options = {
        "config": _undrawn(dense.config),
        "init_method": None,
        "bias": dense.use_bias,
        "skip_bias_add": dense.te_return_bias or not dense.use_bias,
        "tp_group": dense._tp_group,
    }
    layer: Any
    if issubclass(tiled_class, TiledRowParallelLinear):
        layer = tiled_class(columns * ranks, rows, input_is_parallel=True, **options)
    else:
        layer = tiled_class(columns, rows * ranks, gather_output=False, **options)
    layer.config = dense.config
    # An expert's layer, or a shared expert's whose communication runs elsewhere.
    layer.explicit_expert_comm = dense.parallel_mode is None
    _move_parameters(dense, layer)
    if isinstance(layer, TiledTELayerNormColumnParallelLinear):
        layer.set_norm(te.TENorm(dense.config, columns, eps=dense.eps))
    return layer.train(dense.training)


def _undrawn(config: Any) -> Any:
    """For a layer whose parameters are replaced at once: on the CPU, where untouched memory is not taken."""
    config = copy.copy(config)
    config.perform_initialization = False
    config.use_cpu_initialization = True
    return config


def _move_parameters(dense: torch.nn.Module, layer: torch.nn.Module) -> None:
    for name in list(layer._parameters):
        delattr(layer, name)
    for name, parameter in dense.named_parameters(recurse=False):
        layer.register_parameter(name, parameter)
    for name in ("bias", "layer_norm_bias"):
        if name not in layer._parameters:
            layer.register_parameter(name, None)


def spec_classes(column: tuple[int, int], row: tuple[int, int]) -> dict[Any, Any]:
    """``{TransformerEngine's class: what builds it tiled}`` for model specs, by the grids of column and row layers."""
    return {
        dense_class: _builder(dense_class, row if issubclass(tiled, TiledRowParallelLinear) else column)
        for dense_class, tiled in TILED_CLASSES.items()
    }


@functools.cache
def _builder(dense_class: Callable[..., Any], splits: tuple[int, int]) -> type:
    """A class, though it never has instances: Megatron's ``build_module`` does not call plain functions."""

    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        layer = rebuilt(dense_class(*args, **kwargs))
        layer.set_tiles(*splits)
        return layer

    return type(f"Tiled{dense_class.__name__}_{splits[0]}x{splits[1]}", (), {"__new__": build})

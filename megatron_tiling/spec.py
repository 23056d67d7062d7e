"""Tiled layers through Megatron's model specs, for scripts that take `--spec` and know no other flag of ours.

    pretrain_gpt.py --spec megatron_tiling.spec tiled_layer_spec --transformer-impl local ...

tiles fc1 and fc2 of every decoder layer by ``DEFAULT_FACTOR``; ``--transformer-impl transformer_engine`` too. The
output layer is not part of a spec: the runner's ``--use-tiled-linear`` reaches it.
"""

import copy
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tiling.config import (
    DEFAULT_FACTOR,
    MLA_DOWN_PROJECTIONS,
    MODULE_OF_ATTRIBUTE,
    VARIABLE,
    Storage,
    TilingConfig,
)
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.partitioned.layers import PARTITIONED_CLASSES
from megatron_tiling.resident.layers import RESIDENT_CLASSES
from megatron_tiling.resident.transformer_engine import spec_classes
from megatron_tiling.trainer import versions
from megatron_tiling.trainer.norm import SequenceParallelTorchNorm


class TiledSpecProvider:
    """Layer specs, of Megatron's local backend or TransformerEngine's, with tiled linear layers.

    Where neither apex nor TransformerEngine is installed, its torch norm also works under sequence parallelism.

    Args:
        factor: tiles of a layer; by default ``DEFAULT_FACTOR``, which is a number at most once ``tile()`` joins MLPs.
        storage: ``"partitioned"`` builds layers whose tiles are parameters: within ``deepspeed.zero.Init`` a dense
            weight is there while its layer is built, and no longer. ``tile()`` then joins the tiles of MLPs.
        splits: ``{module: (in_splits, out_splits)}`` for modules that do not follow ``factor``.
        modules: the layers to tile, as ``TilingConfig`` takes them.

    Raises:
        ValueError: as ``TilingConfig``; grouped experts are named, which ``tile()`` alone can tile.
    """

    def __init__(
        self,
        factor: int | None = None,
        storage: Storage = "resident",
        splits: Mapping[str, tuple[int, int]] = MappingProxyType({}),
        modules: Any = None,
    ) -> None:
        self.config = TilingConfig(factor, modules, splits, storage=storage)
        if "experts" in splits or (self.config.modules != "all" and "experts" in (self.config.modules or ())):
            raise ValueError("TiledSpecProvider: experts are not tiled by a spec; leave them out, or call tile()")

    def tiled(self, spec: Any) -> Any:
        """A copy of a spec, or of a tree of specs, with the stock classes replaced by those of this provider."""
        return _replaced(spec, self._replacements)

    def _replacements(self, attribute: str) -> dict[Any, Any]:
        """For the submodule of that name."""
        module = MODULE_OF_ATTRIBUTE.get(attribute)
        classes: Mapping[type, Any] = PARTITIONED_CLASSES if self.config.partitioned else RESIDENT_CLASSES
        replacements: dict[Any, Any] = {}
        if module in self.config.tiled_modules:
            splits: tuple[int, ...] = self.config.splits_of(module)
            if self.config.fewer_if_small(module):
                splits += (True,)
            replacements |= {stock: tiled.with_splits(*splits) for stock, tiled in classes.items()}
            replacements |= {} if self.config.partitioned else spec_classes(module, splits)
        if not any(map(importlib.util.find_spec, ("apex", "transformer_engine"))):
            replacements[WrappedTorchNorm] = SequenceParallelTorchNorm
        return replacements


def _tiled(spec: Any) -> Any:
    """By defaults: no flags and no settings of the environment reach a spec."""
    if os.environ.get(VARIABLE):
        log_on_rank_0(
            f"{VARIABLE} has no effect on --spec megatron_tiling.spec: fc1 and fc2 have {DEFAULT_FACTOR} tiles"
        )
    return TiledSpecProvider().tiled(spec)


def _tiled_block_spec(*arguments: Any, vp_stage: int | None = None, **options: Any) -> Any:
    """The decoder's layer specs, local or TransformerEngine's, tiled.

    Args:
        arguments, options: in any order, among them a ``TransformerConfig`` (Megatron-Bridge's provider is one) or a
            config that has one as ``transformer`` (Megatron's). Options of ``get_gpt_decoder_block_spec`` go to it.
        vp_stage: virtual pipeline stage to build; or the whole number among ``arguments`` (slime's are args, config,
            stage).

    Raises:
        TypeError: there is no such config.
    """
    given = [getattr(argument, "transformer", argument) for argument in (*arguments, *options.values())]
    transformer = next((config for config in given if isinstance(config, TransformerConfig)), None)
    if transformer is None:
        raise TypeError("tiled_layer_spec: none of the arguments is, or has as .transformer, a TransformerConfig")
    known = inspect.signature(get_gpt_decoder_block_spec).parameters.keys() - {"config"}
    if vp_stage is None:
        vp_stage = next((stage for stage in arguments if type(stage) is int), None)
    settings = {
        "use_transformer_engine": versions.uses_transformer_engine(transformer),
        "normalization": transformer.normalization,
        "qk_l2_norm": transformer.qk_l2_norm,
        "vp_stage": vp_stage,
    } | {name: value for name, value in options.items() if name in known}
    return _tiled(get_gpt_decoder_block_spec(transformer, **settings))


#: What `--spec megatron_tiling.spec tiled_layer_spec` finds, in the form that this Megatron takes.
tiled_layer_spec: Any = _tiled_block_spec if versions.spec_may_be_a_function() else versions.LayerSpecFromArgs(_tiled)


def _replaced(node: Any, replacements_of: Callable[[str], Mapping[Any, Any]], attribute: str = "") -> Any:
    if isinstance(node, type):
        return replacements_of(attribute).get(node, node)
    if isinstance(node, (list, tuple)):
        return type(node)(_replaced(child, replacements_of) for child in node)
    if isinstance(node, functools.partial):
        keywords = {name: _replaced(value, replacements_of, name) for name, value in node.keywords.items()}
        return functools.partial(node.func, *node.args, **keywords)
    if isinstance(node, ModuleSpec) or type(node).__name__.endswith("Submodules"):
        changed = copy.copy(node)
        for name, child in vars(node).items():
            if name not in MLA_DOWN_PROJECTIONS:
                setattr(changed, name, _replaced(child, replacements_of, name))
        return changed
    return node

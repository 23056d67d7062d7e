"""tile(model, config): a built model's linear layers, MLPs and LM head become tiled ones, in place.

First all of it is planned, and whatever cannot be is refused; then it is done, and nothing is refused any more.

Nothing is drawn, copied or moved: the class and the grid of a module are set; only with partitioned storage a weight
is copied into its tiles and freed, one layer after another. To be called before the model is wrapped by Float16Module,
DDP, FSDP or an engine. Adapters around layers stay where they are.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_tiling.config import (
    MLA_DOWN_PROJECTIONS,
    MODULE_OF_ATTRIBUTE,
    NOT_ASKED_FOR,
    OVERLAPPED_MODULES,
    ROW_MODULES,
    TilingConfig,
)
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.partitioned.layers import PartitionedParallelLinear, make_partitioned
from megatron_tiling.partitioned.mlp import PARTITIONED_MLP_CLASSES
from megatron_tiling.report import LayerReport
from megatron_tiling.resident import experts as grouped
from megatron_tiling.resident.adapters import name_without_adapters, unwrapped
from megatron_tiling.resident.layers import (
    RESIDENT_CLASSES,
    TiledParallelLinear,
    check_layer,
    reason_in_output_dtype,
    shard_shape,
)
from megatron_tiling.resident.lm_head import TiledOutputLayer, check_head, convert_head, head_tiles
from megatron_tiling.resident.mlp import (
    MLP_LAYERS,
    TILED_MLP_CLASSES,
    TiledMLP,
    check_keep,
    convert_mlp,
    reason_for_no_overlap,
    reason_to_stay_stock,
)
from megatron_tiling.resident.stepped import reason_for_no_steps
from megatron_tiling.resident.stock_code import replaced_in_products
from megatron_tiling.resident.transformer_engine import TILED_CLASSES as TILED_TE_CLASSES
from megatron_tiling.resident.transformer_engine import reason_to_stay_dense
from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT, TileGrid
from megatron_tiling.tiles.step_comm import LEAST_LAYER_OPERATIONS, LEAST_MLP_OPERATIONS, tokens_for

TILED_CLASSES: dict[type[torch.nn.Module], type[TiledParallelLinear]] = {**RESIDENT_CLASSES, **TILED_TE_CLASSES}
#: Of experts in grouped GEMMs.
GROUPED_CLASSES = tuple(grouped.TILED_CLASSES)


def tile(model: torch.nn.Module, config: TilingConfig) -> list[LayerReport]:
    """Turn a model's linear layers, local or TransformerEngine's, into tiled ones, and say what was done with each.

    MLPs whose two layers are tiled become ``TiledMLP`` where their grids match, and the output layer of a language
    model, if tiled, one whose loss is computed tile by tile. What is tiled already stays as it is.

    Args:
        model: one built model chunk (GPTModel, HybridModel, or a part), not yet wrapped.
        config: which layers, and their grids.

    Raises:
        ValueError: a grid does not fit a layer's shard, naming layer, number, limit and flag, or a layer, an MLP or
            the LM head has an option that tiled ones lack, naming it. Nothing of the model is changed.
    """
    plan = _Plan(model, config)
    plan.carry_out()
    reports = list(plan.reports.values())
    asked = [report for report in reports if report.module in config.tiled_modules and report.module != "output"]
    if asked and not any(report.is_tiled for report in asked):
        reasons = ", ".join(dict.fromkeys(report.reason for report in asked))
        log_on_rank_0(f"warning: none of the {len(asked)} linear layers of {type(model).__name__} is tiled: {reasons}")
    if not hasattr(model, "tiling_reports"):
        model.tiling_reports = reports  # type: ignore[assignment]
    return reports


class _Plan:
    """What is to become of a model's layers, MLPs and heads. Making it changes nothing of the model.

    Attributes:
        reports: what each layer of the model will be.
        tiled: layers to be tiled.
        heads: language models whose loss is to be computed in tiles.
        mlps: what turns an MLP, or grouped experts, into tiled ones, each.
        owners: how many modules have a parameter.
        in_bf16: modules of layers that ``--first-last-layers-bf16`` leaves out of FP8.
    """

    def __init__(self, model: torch.nn.Module, config: TilingConfig) -> None:
        self.config = config
        self.reports: dict[torch.nn.Module, LayerReport] = {}
        self.tiled: list[torch.nn.Module] = []
        self.heads: list[LanguageModule] = []
        self.mlps: list[Callable[[], Any]] = []
        self.in_bf16 = _modules_in_bf16(model)
        self.owners = Counter(weight for module in model.modules() for weight in module.parameters(recurse=False))
        models: list[Any] = [module for module in model.modules() if isinstance(module, LanguageModule)]
        ties = "share_embeddings_and_output_weights"
        tied = [unwrapped(getattr(one, "output_layer", None)) for one in models if getattr(one, ties, False)]
        within: set[torch.nn.Module] = set()
        self.dispatchers = {
            layer.experts: layer.token_dispatcher
            for layer in model.modules()
            if isinstance(layer, MoELayer) and layer.experts is not None
        }
        for path, layer in model.named_modules():
            if unwrapped(layer) is not layer or layer in within:  # an adapter, or a layer of grouped experts
                continue
            name = name_without_adapters(path)
            if isinstance(layer, GROUPED_CLASSES):
                within.update(layer.modules())
                self.reports[layer] = self._planned_experts(name, layer)
                continue
            looks_linear = name.rpartition(".")[2] in (*MODULE_OF_ATTRIBUTE, *MLA_DOWN_PROJECTIONS)
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) or looks_linear:
                self.reports[layer] = self._planned_layer(name, layer, is_tied=layer in tied)
        for one in models:
            self._plan_head(one)
        for name, module in model.named_modules():
            if isinstance(module, MLP):
                self._plan_mlp(name, module)

    def _planned_layer(self, name: str, layer: Any, is_tied: bool) -> LayerReport:
        module = MODULE_OF_ATTRIBUTE.get(name.rpartition(".")[2])
        report = LayerReport(name, shard_shape(layer), _element_size(layer))
        if isinstance(layer, TiledParallelLinear):  # built so, from a spec, or tiled before
            partitioned, fewer = isinstance(layer, PartitionedParallelLinear), layer.fewer_if_small
            report = replace(report, grid=layer.grid, partitioned=partitioned, fewer_if_small=fewer)
            if layer.overlap_steps is not None:
                return self._with_steps(report, layer, layer.overlap_steps, layer.least_overlap_tokens)
            without = self.config.overlap_steps and module in OVERLAPPED_MODULES
            return replace(report, no_overlap="it was tiled without") if without else report
        reason = _reason_to_stay_dense(name, layer, module, self.config, layer not in self.in_bf16)
        if not reason and self.config.partitioned:
            reason = _reason_not_to_partition(layer, module, is_tied, self.owners)
        if module is None or reason:
            return replace(report, reason=reason)
        check_layer(layer)
        self.tiled.append(layer)
        if type(layer) in TILED_TE_CLASSES and self.config.partitioned:
            raise ValueError(
                f"--tiled-linear-storage partitioned: {name} is a layer of TransformerEngine's, whose tiles cannot "
                "be parameters; use --transformer-impl local"
            )
        paired = self.config.partitioned and module == "fc1" and bool(getattr(layer.config, "gated_linear_unit", False))
        grid = _grid(name, module, report.shape, self.config, paired)
        fewer = self.config.fewer_if_small(module)
        report = replace(report, grid=grid, partitioned=self.config.partitioned, fewer_if_small=fewer)
        least_tokens = self._least_tokens(LEAST_LAYER_OPERATIONS, layer)
        return self._with_steps(report, layer, self.config.overlap_steps, least_tokens)

    def _with_steps(self, report: LayerReport, layer: Any, steps: int | None, least_tokens: int) -> LayerReport:
        """In how many steps a layer outside an MLP overlaps its communication, and why not if it was asked to."""
        if steps is None or report.module not in OVERLAPPED_MODULES:
            return report
        if reason := reason_for_no_steps(layer, is_row=report.module in ROW_MODULES):
            return replace(report, no_overlap=reason)
        return replace(report, overlap_steps=steps, least_overlap_tokens=least_tokens)

    def _least_tokens(self, operations: float, *layers: Any) -> int:
        """Tokens from which on these layers' products are worth their steps, where that is for us to say."""
        if self.config.tp_overlap != "auto" or None in layers:
            return 0
        return tokens_for(operations, sum(prod(shard_shape(layer)) for layer in layers) or 1)

    def _planned_experts(self, name: str, experts: Any) -> LayerReport:
        """Of grouped experts, fc1 and fc2 of all of them."""
        shape, tiles = grouped.shard_shape(experts), self.config.splits_of("experts")[1]
        report = LayerReport(name, shape, _element_size(experts), experts=experts.num_local_experts)
        keep = self.config.kept_tiles
        in_fp8 = isinstance(experts, TEGroupedMLP) and bool(experts.config.fp8) and experts not in self.in_bf16
        if isinstance(experts, grouped.TiledExperts):  # tiled before
            tiles, keep, gathers = experts.tiles, experts.keep, experts._dispatcher is not None
        else:
            reason = "" if "experts" in self.config.tiled_modules else NOT_ASKED_FOR
            partitioned = "partitioned tiles are not of grouped experts" if self.config.partitioned else ""
            if reason := reason or partitioned or grouped.reason_to_stay_stock(experts):
                return replace(report, reason=reason)
            convert: Callable[..., Any] = grouped.convert_experts
            if in_fp8:
                try:
                    from megatron_tiling.resident import fp8_experts
                except ImportError as error:
                    return replace(report, reason=_needs_newer(experts, error))
                if reason := fp8_experts.reason_for_no_fp8_experts(experts):
                    return replace(report, reason=reason)
                convert = fp8_experts.convert_fp8_experts
            check_keep(keep, tiles, "grouped experts")
            dispatcher = self.dispatchers.get(experts)
            gathers = grouped.gathers_rows(dispatcher, self.config)
            self.mlps.append(partial(convert, experts, self.config, dispatcher if gathers else None))
        return replace(
            report,
            expert_tiles=tiles,
            kept_tiles=tiles if keep is None else keep,
            gathers_rows=gathers,
            fp8=in_fp8,
            no_overlap="experts" if self.config.overlap_steps else "",
        )

    def _plan_head(self, model: LanguageModule) -> None:
        layer: Any = unwrapped(getattr(model, "output_layer", None))
        report = self.reports.get(layer)
        if isinstance(layer, TiledOutputLayer) and report is not None:
            self.reports[layer] = replace(report, loss_tiles=layer.head_tiles)
        elif report is not None and report.grid is not None and not report.partitioned:
            wrapped = layer is not model.output_layer
            reason = "an adapter is around the output layer" if wrapped else check_head(model, self.config)
            self.reports[layer] = replace(report, reason=reason, loss_tiles=None if reason else head_tiles(self.config))
            if not reason:
                self.heads.append(model)

    def _plan_mlp(self, name: str, mlp: Any) -> None:
        layers: list[Any] = [unwrapped(getattr(mlp, child, None)) for child in MLP_LAYERS]
        reports = [self.reports.get(layer) for layer in layers]
        in_fp8 = self._is_in_fp8(layers)
        grids: list[Any] = [None if report is None else report.grid for report in reports]
        if in_fp8:
            grids = self._fp8_grids(mlp, layers)
        partitioned = {report.partitioned for report in reports if report is not None and report.grid is not None}
        keep, reason = self.config.kept_tiles, ""
        steps, least_tokens = self.config.overlap_steps, self._least_tokens(LEAST_MLP_OPERATIONS, *layers)
        if isinstance(mlp, TiledMLP):
            keep = mlp.keep
            if not in_fp8:
                steps, least_tokens = mlp.overlap_steps, mlp.least_overlap_tokens
        elif in_fp8:
            reason = self._plan_fp8_loop(mlp, layers, grids)
        elif len(partitioned) == 2:
            reason = "the tiles of one of its layers alone are partitioned"
        elif partitioned:
            classes = PARTITIONED_MLP_CLASSES if partitioned == {True} else TILED_MLP_CLASSES
            reason = reason_to_stay_stock(mlp, keep, classes, layers, grids)
            found = ((child, classes[MLP].reason_in_adapter(getattr(mlp, child, None))) for child in MLP_LAYERS)
            adapted = ", ".join(f"{child} {why}" for child, why in found if why)
            if self.config.partitioned:
                reason = reason or adapted
            if not reason:
                self.mlps.append(partial(convert_mlp, mlp, keep, classes, self.config.overlap_steps, least_tokens))
                reason = adapted  # the MLP runs the loop once that adapter is gone
        fewer = keep is None and all(report is not None and report.fewer_if_small for report in reports)
        no_overlap = "" if steps is None else "FP8" if in_fp8 else reason_for_no_overlap(mlp)
        if steps is None or no_overlap:
            steps, least_tokens = 0, 0
        for layer, report, grid in zip(layers, reports, grids, strict=True):
            if report is None or grid is None:
                continue
            if reason:
                self.reports[layer] = replace(report, reason=reason)
            else:
                kept = grid.tiles if keep is None else keep
                report = replace(report, overlap_steps=steps, least_overlap_tokens=least_tokens, no_overlap=no_overlap)
                report = replace(report, fewer_if_small=fewer, fp8=in_fp8)
                self.reports[layer] = replace(report, reason="", grid=grid, mlp=name, kept_tiles=kept)

    def _is_in_fp8(self, layers: list[Any]) -> bool:
        """Whether two layers stay TransformerEngine's, and an MLP that is tiled in FP8 may run in their place."""
        return {"fc1", "fc2"} <= set(self.config.tiled_modules) and all(
            type(layer) in TILED_TE_CLASSES and layer.config.fp8 and layer not in self.in_bf16 for layer in layers
        )

    def _fp8_grids(self, mlp: Any, layers: list[Any]) -> list[TileGrid]:
        grids = []
        for layer in layers:
            report = self.reports[layer]
            grids.append(_grid(report.name, report.module, report.shape, self.config, paired=False))
        if isinstance(mlp, TiledMLP):  # tiled before
            tiles = len(mlp.parts) - 1
            grids = [replace(grids[0], out_splits=tiles), replace(grids[1], in_splits=tiles)]
        return grids

    def _plan_fp8_loop(self, mlp: Any, layers: list[Any], grids: list[TileGrid]) -> str:
        """Why there is none, or nothing."""
        try:
            from megatron_tiling.resident import fp8
        except ImportError as error:
            return _needs_newer(mlp, error)
        grids[1] = fp8.aligned(grids[1], mlp.config)
        adapted = [name for name, layer in zip(MLP_LAYERS, layers, strict=True) if getattr(mlp, name) is not layer]
        reasons = (
            f"an adapter is around {' and '.join(adapted)}" if adapted else "",
            "tiles in FP8 cannot be partitioned" if self.config.partitioned else "",
            *map(partial(reason_to_stay_dense, in_fp8=False), layers, ("fc1", "fc2")),
            fp8.reason_for_no_fp8_tiles(mlp, grids[1]),
        )
        reason = next(filter(None, reasons), "")
        reason = reason or reason_to_stay_stock(mlp, self.config.kept_tiles, fp8.FP8_MLP_CLASSES, layers, grids)
        if not reason:
            self.mlps.append(partial(fp8.convert_fp8_mlp, mlp, grids[1], self.config))
        return reason

    def carry_out(self) -> None:
        for layer in self.tiled:
            self._make_tiled(layer, self.reports[layer].grid)
        for model in self.heads:
            convert_head(model, self.config)
        for convert in self.mlps:
            convert()

    def _make_tiled(self, layer: Any, grid: Any) -> None:
        """Turn a stock layer into a tiled one, in place."""
        if self.config.partitioned:
            make_partitioned(layer, grid)
            return
        layer.__class__ = TILED_CLASSES[type(layer)]
        layer.adopt()
        layer.set_grid(grid, fp32_accumulate=self.config.fp32_accumulate)
        report = self.reports[layer]
        layer.fewer_if_small = report.fewer_if_small
        layer.overlap_steps, layer.least_overlap_tokens = report.overlap_steps or None, report.least_overlap_tokens
        if self.config.fuse_wgrad is not None:
            layer.gradient_accumulation_fusion = self.config.fuse_wgrad


def _grid(name: str, module: str, shape: tuple[int, int], config: TilingConfig, paired: bool) -> TileGrid:
    in_splits, out_splits = config.splits_of(module)
    try:
        return TileGrid(shape[1], shape[0], in_splits, out_splits, paired, FEATURE_ALIGNMENT)
    except ValueError as error:
        flag = f"--tiled-linear-splits {module}=" if module in config.splits else "--tile-factor "
        value = f"{in_splits}x{out_splits}" if module in config.splits else str(in_splits * out_splits)
        raise ValueError(
            f"{flag}{value}: {name} has [out, in] = {list(shape)} on each rank, and {error}; "
            f"lower it, or give --tiled-linear-splits {module}=INxOUT for this module alone"
        ) from None


def _modules_in_bf16(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Of the layers that a block runs without FP8, though the model is in FP8."""
    layers = [layer for block in model.modules() if isinstance(block, TransformerBlock) for layer in block.layers]
    return {
        module
        for layer in layers
        if getattr(getattr(layer, "config", None), "fp8", None)
        and is_first_last_bf16_layer(layer.config, layer.layer_number - 1)
        for module in layer.modules()
    }


def _reason_to_stay_dense(name: str, layer: Any, module: str | None, config: TilingConfig, in_fp8: bool) -> str:
    attribute = name.rpartition(".")[2]
    if attribute in MLA_DOWN_PROJECTIONS:
        return "multi-latent attention needs the stock class here"
    if type(layer) not in TILED_CLASSES:
        return f"{type(layer).__name__} is not a stock column or row layer"
    if module is None:
        return "not one of the modules that are tiled"
    if module not in config.tiled_modules:
        return NOT_ASKED_FOR
    if reason := reason_in_output_dtype(getattr(layer, "output_dtype", None), layer.config.params_dtype):
        return reason
    return reason_to_stay_dense(layer, module, in_fp8) if type(layer) in TILED_TE_CLASSES else replaced_in_products()


def _needs_newer(module: Any, error: ImportError) -> str:
    return f"--fp8-format {module.config.fp8}: tiles need a newer TransformerEngine or megatron-core: {error}"


def _reason_not_to_partition(layer: Any, module: str | None, is_tied: bool, owners: Counter[torch.nn.Parameter]) -> str:
    """Where Megatron reads the whole weight."""
    if is_tied or getattr(layer, "weight", None) is None:
        return "tied to the embedding, whose weight stays whole" if is_tied else "has no weight of its own"
    if owners[layer.weight] > 1:
        return "its weight is another module's too"
    if module == "output" and getattr(layer.config, "mtp_detach_heads", False):
        return "--mtp-detach-heads reads the whole weight"
    if module == "qkv" and getattr(layer.config, "qk_clip", False):
        return "--qk-clip changes the whole weight"
    return ""


def _element_size(layer: torch.nn.Module) -> int:
    parameter = next(layer.parameters(), None)
    if parameter is not None:
        return parameter.element_size()
    return layer.config.params_dtype.itemsize if hasattr(layer, "config") else 0  # type: ignore[union-attr, return-value]

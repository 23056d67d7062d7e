"""tile(model, config): a built model's linear layers, MLPs and LM head become tiled ones, in place.

Nothing is drawn, copied or moved: the class and the grid of a module are set. Only TransformerEngine's layers are
replaced by new ones, which take over their parameters; and with partitioned storage a weight is copied into its tiles
and freed, one layer after another. To be called before the model is wrapped by Float16Module, DDP, FSDP or an engine.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP

from megatron_tiling.arguments import REFUSED, refuse
from megatron_tiling.config import MLA_DOWN_PROJECTIONS, MODULE_OF_ATTRIBUTE, TilingConfig
from megatron_tiling.partitioned.layers import PARTITIONED_CLASSES, make_partitioned
from megatron_tiling.partitioned.mlp import PartitionedMLP, convert_partitioned_mlp
from megatron_tiling.report import LayerReport
from megatron_tiling.resident import transformer_engine
from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.resident.lm_head import convert_head
from megatron_tiling.resident.mlp import convert_mlp
from megatron_tiling.tiles.grid import ALIGNMENT, TileGrid

TILED_CLASSES = {ColumnParallelLinear: TiledColumnParallelLinear, RowParallelLinear: TiledRowParallelLinear}
PARTITIONED = tuple(PARTITIONED_CLASSES.values())


def tile(model: torch.nn.Module, config: TilingConfig) -> list[LayerReport]:
    """Turn a model's linear layers, local or TransformerEngine's, into tiled ones, and say what was done with each.

    MLPs whose two layers are tiled become ``TiledMLP`` where their grids match, and the output layer of a language
    model, if tiled, one whose loss is computed tile by tile.

    Args:
        model: one built model chunk (GPTModel, HybridModel, or a part), not yet wrapped.
        config: which layers, and their grids.

    Raises:
        ValueError: a grid does not fit a layer's shard, naming layer, number, limit and flag, or TransformerEngine's
            layers have an option that tiled ones lack, naming it. No layer is changed.
    """
    reports, chosen = [], []
    tied = _tied_output_layers(model)
    for name, layer in _linear_layers(model):
        module = MODULE_OF_ATTRIBUTE.get(name.rpartition(".")[2])
        shape, size = _shard_shape(layer), _element_size(layer)
        if isinstance(layer, PARTITIONED):  # built so, from a spec
            reports.append(LayerReport(name, shape, layer.grid, size))
            continue
        reason = _reason_to_stay_dense(name, layer, module, config)
        if not reason and config.partitioned:
            reason = _reason_not_to_partition(layer, module, tied)
        if module is None or reason:
            reports.append(LayerReport(name, shape, None, size, reason))
            continue
        refuse(layer.config, REFUSED["tiled layers"])
        if type(layer) in transformer_engine.TILED_CLASSES:
            refuse(layer.config, REFUSED["tiled layers of TransformerEngine"])
            if config.partitioned:
                raise ValueError(
                    f"--tiled-linear-storage partitioned: {name} is a layer of TransformerEngine's, whose tiles cannot "
                    "be parameters; use --transformer-impl local"
                )
        paired = config.partitioned and module == "fc1" and bool(getattr(layer.config, "gated_linear_unit", False))
        grid = _grid(name, module, shape, config, paired)
        if module == "fc2" and config.kept_tiles is not None and config.kept_tiles > grid.in_splits:
            raise ValueError(
                f"--tiled-mlp-keep {config.kept_tiles}: {name} has {grid.in_splits} tiles; "
                "give at most that many, or all"
            )
        chosen.append((name, layer, grid))
        reports.append(LayerReport(name, shape, grid, size))
    for name, layer, grid in chosen:
        if config.partitioned:
            make_partitioned(layer, grid)
            continue
        if type(layer) in transformer_engine.TILED_CLASSES:
            layer = transformer_engine.rebuilt(layer)
            model.set_submodule(name, layer)
        make_tiled(layer, grid.in_splits, grid.out_splits, config)
    notes = _convert_heads(model, config) | _convert_mlps(model, config)
    return [replace(report, note=report.note or notes.get(report.name, "")) for report in reports]


def _grid(name: str, module: str, shape: tuple[int, int], config: TilingConfig, paired: bool) -> TileGrid:
    in_splits, out_splits = config.splits_of(module)
    try:
        return TileGrid(shape[1], shape[0], in_splits, out_splits, paired, ALIGNMENT)
    except ValueError as error:
        flag = f"--tiled-linear-splits {module}=" if module in config.splits else "--tile-factor "
        value = f"{in_splits}x{out_splits}" if module in config.splits else str(config.factor)
        raise ValueError(
            f"{flag}{value}: {name} has [out, in] = {list(shape)} on each rank, and {error}; "
            f"lower it, or give --tiled-linear-splits {module}=INxOUT for this module alone"
        ) from None


def _convert_mlps(model: torch.nn.Module, config: TilingConfig) -> dict[str, str]:
    """Notes by the names of the linear layers in MLPs."""
    notes: dict[str, str] = {}
    for name, mlp in model.named_modules():
        children = ("linear_fc1", "linear_fc2")
        tiled = (TiledColumnParallelLinear, TiledRowParallelLinear)
        if isinstance(mlp, MLP) and any(isinstance(getattr(mlp, child), tiled) for child in children):
            partitioned = isinstance(mlp.linear_fc1, PARTITIONED)
            if isinstance(mlp, PartitionedMLP):
                reason = ""
            else:
                reason = (convert_partitioned_mlp if partitioned else convert_mlp)(mlp, config.kept_tiles)
            kept = "all" if config.kept_tiles is None else str(config.kept_tiles)
            note = f"stock MLP: {reason}" if reason else f"TiledMLP, keep {kept}"
            if partitioned:
                note = f"partitioned, {note}"
            notes |= {f"{name}.{child}".removeprefix("."): note for child in children}
    return notes


def _convert_heads(model: torch.nn.Module, config: TilingConfig) -> dict[str, str]:
    """Notes by the names of output layers, and of partitioned layers outside MLPs."""
    notes = {name: "partitioned" for name, layer in model.named_modules() if isinstance(layer, PARTITIONED)}
    for name, module in model.named_modules():
        if isinstance(module, LanguageModule) and isinstance(
            getattr(module, "output_layer", None), TiledColumnParallelLinear
        ):
            if isinstance(module.output_layer, PARTITIONED):
                note = "partitioned, logits whole"
            else:
                reason = convert_head(module, config)
                note = f"logits whole: {reason}" if reason else "loss in tiles of logits"
            notes[f"{name}.output_layer".removeprefix(".")] = note
    return notes


def make_tiled(layer: torch.nn.Module, in_splits: int, out_splits: int, config: TilingConfig) -> None:
    """Turn a local stock layer into a tiled one, in place; of one that is tiled, change the grid."""
    layer.__class__ = TILED_CLASSES.get(type(layer), type(layer))
    assert isinstance(layer, (TiledColumnParallelLinear, TiledRowParallelLinear))
    layer.set_tiles(in_splits, out_splits, fp32_accumulate=config.fp32_accumulate)
    if config.fuse_wgrad is not None:
        layer.gradient_accumulation_fusion = config.fuse_wgrad


def _linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers that could be tiled, or that do a linear layer's work in another way."""
    for name, module in model.named_modules():
        looks_linear = name.rpartition(".")[2] in (*MODULE_OF_ATTRIBUTE, *MLA_DOWN_PROJECTIONS)
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) or looks_linear:
            yield name, module


def _reason_to_stay_dense(name: str, layer: torch.nn.Module, module: str | None, config: TilingConfig) -> str:
    attribute = name.rpartition(".")[2]
    if attribute in MLA_DOWN_PROJECTIONS:
        return "multi-latent attention needs the stock class here"
    if isinstance(layer, tuple(TILED_CLASSES.values())):
        return "tiled already"
    if type(layer) not in (*TILED_CLASSES, *transformer_engine.TILED_CLASSES):
        return f"{type(layer).__name__} is not a stock column or row layer"
    if module is None:
        return "not one of the modules that are tiled"
    if module not in config.modules:
        return "not in --tiled-linear-modules"
    if type(layer) in transformer_engine.TILED_CLASSES:
        return transformer_engine.reason_to_stay_dense(layer)
    return ""


def _reason_not_to_partition(layer: torch.nn.Module, module: str | None, tied: list[torch.nn.Module]) -> str:
    """Where Megatron reads the whole weight."""
    if layer in tied:
        return "tied to the embedding, whose weight stays whole"
    if module == "output" and getattr(layer.config, "mtp_detach_heads", False):
        return "--mtp-detach-heads reads the whole weight"
    if module == "qkv" and getattr(layer.config, "qk_clip", False):
        return "--qk-clip changes the whole weight"
    return ""


def _tied_output_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    models = [module for module in model.modules() if isinstance(module, LanguageModule)]
    return [
        module.output_layer
        for module in models
        if getattr(module, "share_embeddings_and_output_weights", False) and hasattr(module, "output_layer")
    ]


def _shard_shape(layer: torch.nn.Module) -> tuple[int, int]:
    if isinstance(layer, ColumnParallelLinear):
        return layer.output_size_per_partition, layer.input_size
    if isinstance(layer, RowParallelLinear):
        return layer.output_size, layer.input_size_per_partition
    weight = next((weight for weight in layer.parameters(recurse=False) if weight.dim() > 1), None)
    return (weight.shape[0], weight.shape[-1]) if weight is not None else (0, 0)


def _element_size(layer: torch.nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return weight.element_size() if isinstance(weight, torch.Tensor) else layer.config.params_dtype.itemsize  # type: ignore[union-attr, return-value]

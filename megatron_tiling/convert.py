"""tile(model, config): the stock linear layers of a built model become tiled ones, in place.

Nothing is drawn, copied or moved: a layer's class and its grid are set. To be called before the model is wrapped
by Float16Module and DDP.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_tiling.config import TilingConfig
from megatron_tiling.grid import TileGrid
from megatron_tiling.layers import TiledColumnParallelLinear, TiledRowParallelLinear

#: Attribute name of a layer in its parent module -> the module name that flags use.
MODULE_OF_ATTRIBUTE = {
    "linear_qkv": "qkv",
    "linear_q": "qkv",
    "linear_kv": "qkv",
    "linear_q_proj": "qkv",
    "linear_q_up_proj": "qkv",
    "linear_kv_up_proj": "qkv",
    "linear_proj": "proj",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
    "output_layer": "output",
}
#: Multi-latent attention asks whether these are stock layers, by exact class.
MLA_DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj", "linear_qkv_down_proj")
TILED_CLASSES = {ColumnParallelLinear: TiledColumnParallelLinear, RowParallelLinear: TiledRowParallelLinear}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: its dense shape ``[out, in]`` on this rank and its grid, or why it stayed dense."""

    name: str
    shape: tuple[int, int]
    grid: TileGrid | None
    element_size: int
    reason: str = ""

    @property
    def tile_mib(self) -> float:
        """MiB of the largest tile, or of the whole weight if dense."""
        rows, columns = self.shape
        if self.grid is not None:
            rows, columns = self.grid.out_size(0), self.grid.in_size(0)
        return rows * columns * self.element_size / 2**20


def tile(model: torch.nn.Module, config: TilingConfig) -> list[LayerReport]:
    """Turn the model's stock column and row layers into tiled ones, and say what was done with each linear layer.

    Args:
        model: one built model chunk (GPTModel, HybridModel, or a part), not yet wrapped.
        config: which layers, and their grids.

    Raises:
        ValueError: a grid does not fit a layer's shard, naming layer, number, limit and flag. No layer is changed.
    """
    reports, chosen = [], []
    for name, layer in _linear_layers(model):
        module = MODULE_OF_ATTRIBUTE.get(name.rpartition(".")[2])
        shape, size = _shard_shape(layer), _element_size(layer)
        reason = _reason_to_stay_dense(name, layer, module, config)
        if module is None or reason:
            reports.append(LayerReport(name, shape, None, size, reason))
            continue
        in_splits, out_splits = config.splits_of(module)
        try:
            grid = TileGrid(shape[1], shape[0], in_splits, out_splits)
        except ValueError as error:
            flag = f"--tiled-linear-splits {module}=" if module in config.splits else "--tile-factor "
            value = f"{in_splits}x{out_splits}" if module in config.splits else str(config.factor)
            raise ValueError(
                f"{flag}{value}: {name} has [out, in] = {list(shape)} on each rank, and {error}; "
                f"lower it, or give --tiled-linear-splits {module}=INxOUT for this module alone"
            ) from None
        chosen.append((layer, grid))
        reports.append(LayerReport(name, shape, grid, size))
    for layer, grid in chosen:
        make_tiled(layer, grid.in_splits, grid.out_splits, config)
    return reports


def make_tiled(layer: torch.nn.Module, in_splits: int, out_splits: int, config: TilingConfig) -> None:
    """One stock layer, in place."""
    tiled_class = TILED_CLASSES[type(layer)]  # type: ignore[index]
    layer.__class__ = tiled_class
    assert isinstance(layer, (TiledColumnParallelLinear, TiledRowParallelLinear))
    layer.set_tiles(in_splits, out_splits, fp32_accumulate=config.fp32_accumulate)
    if config.fuse_wgrad is not None:
        layer.gradient_accumulation_fusion = config.fuse_wgrad


def table(reports: list[LayerReport]) -> str:
    """The startup table: module, dense shape, grid and tile MiB; equal layers of the model share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", report.name)
        grid = f"{report.grid}" if report.grid else "dense"
        shape = " x ".join(map(str, report.shape))
        lines.setdefault((pattern, shape, grid, f"{report.tile_mib:.2f}", report.reason), []).append(report.name)
    rows = [("module", "layers", "shape [out x in]", "in x out", "tile MiB", "")]
    rows += [(key[0], str(len(names)), *key[1:]) for key, names in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


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
    if type(layer) not in TILED_CLASSES:
        return f"{type(layer).__name__} is not a stock column or row layer"
    if module is None:
        return "not one of the modules that are tiled"
    if module not in config.modules:
        return "not in --tiled-linear-modules"
    return ""


def _shard_shape(layer: torch.nn.Module) -> tuple[int, int]:
    if isinstance(layer, ColumnParallelLinear):
        return layer.output_size_per_partition, layer.input_size
    if isinstance(layer, RowParallelLinear):
        return layer.output_size, layer.input_size_per_partition
    weight = next(iter(layer.parameters(recurse=False)), None)
    return (weight.shape[0], weight.shape[-1]) if weight is not None and weight.dim() > 1 else (0, 0)


def _element_size(layer: torch.nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return weight.element_size() if isinstance(weight, torch.Tensor) else layer.config.params_dtype.itemsize  # type: ignore[union-attr, return-value]

"""What became of each layer of a model: data, the startup table, and the advice below it."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from megatron_tiling.config import MODULE_OF_ATTRIBUTE, ROW_MODULES, TilingConfig
from megatron_tiling.tiles.grid import TileGrid


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: its dense shape ``[out, in]`` on this rank, its grid if tiled, and a note.

    The note says why a layer stayed dense, and for fc1, fc2 and the output layer how their tiles are used.
    """

    name: str
    shape: tuple[int, int]
    grid: TileGrid | None
    element_size: int
    note: str = ""

    def natural_splits(self, module: str) -> int:
        """Tiles along the dimension that ``--tile-factor`` cuts."""
        assert self.grid is not None
        return self.grid.in_splits if module in ROW_MODULES else self.grid.out_splits

    def with_splits(self, splits: tuple[int, int]) -> Self:
        assert self.grid is not None
        return replace(self, grid=replace(self.grid, in_splits=splits[0], out_splits=splits[1]))

    @property
    def tile_mib(self) -> float:
        """MiB of the largest tile, or of the whole weight if dense."""
        rows, columns = self.shape
        if self.grid is not None:
            rows, columns = self.grid.out_size(0), self.grid.in_size(0)
        return rows * columns * self.element_size / 2**20


def table(reports: list[LayerReport]) -> str:
    """The startup table: module, dense shape, grid and tile MiB; equal layers of the model share a line.

    Below it, grids of fewer tiles for partitioned layers, if there are some that gather no more at once.
    """
    lines: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", report.name)
        grid = f"{report.grid}" if report.grid else "dense"
        shape = " x ".join(map(str, report.shape))
        lines.setdefault((pattern, shape, grid, f"{report.tile_mib:.2f}", report.note), []).append(report.name)
    rows: list[tuple[str, ...]] = [("module", "layers", "shape [out x in]", "in x out", "tile MiB", "")]
    rows += [(key[0], str(len(names)), *key[1:]) for key, names in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = "\n".join("  ".join(cells).rstrip() for cells in padded)
    if coarser := coarser_splits(reports):
        text += f"\nFewer tiles gather no more at once, and cost the host less. Add to the grids: {as_flag(coarser)}"
    return text


def coarser_splits(reports: list[LayerReport]) -> dict[str, tuple[int, int]]:
    """Grids of fewer tiles for partitioned layers, none larger than what is gathered at once anyway, by module.

    Each tile costs host time in each pass. A tile of a ``TiledMLP``, one of fc1 and one of fc2, is gathered as one.
    """
    layers: defaultdict[str, list[LayerReport]] = defaultdict(list)
    gathered: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        parent, _, attribute = report.name.rpartition(".")
        if report.grid is not None and report.note.startswith("partitioned"):
            gathered[parent if "TiledMLP" in report.note else report.name] += report.tile_mib
            layers[MODULE_OF_ATTRIBUTE.get(attribute, "")].append(report)
    coarser = {}
    for module, of_module in layers.items():
        if not module or any("TiledMLP" in report.note for report in of_module):
            continue
        for tiles in range(1, min(report.natural_splits(module) for report in of_module)):
            splits = TilingConfig(factor=tiles).splits_of(module)
            if all(report.with_splits(splits).tile_mib <= max(gathered.values()) for report in of_module):
                coarser[module] = splits
                break
    return coarser


def as_flag(splits: Mapping[str, tuple[int, int]]) -> str:
    """``{"fc1": (1, 8)}`` -> ``--tiled-linear-splits fc1=1x8``."""
    settings = (f"{module}={in_splits}x{out_splits}" for module, (in_splits, out_splits) in splits.items())
    return f"--tiled-linear-splits {' '.join(settings)}"

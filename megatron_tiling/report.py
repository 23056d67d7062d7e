"""What became of each layer of a model: data, the startup table, and the advice below it."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from megatron_tiling.config import DEFAULT_HEAD_MEMORY_MIB, MODULE_OF_ATTRIBUTE, ROW_MODULES, TilingConfig
from megatron_tiling.tiles import step_comm
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head_cut import HeadTiles, partition_aligned

MIB = 2**20


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name: in the model.
        shape: of the dense weight on this rank, ``[out, in]``.
        element_size: bytes of one element of it.
        grid: its tiles; ``None`` if it stayed dense.
        partitioned: its tiles are parameters of their own.
        reason: why it stayed dense, or why a tiled layer's MLP or loss is stock's.
        mlp: name of the tiled MLP whose tiles are one of fc1 and one of fc2; an engine gathers both as one.
        kept_tiles: how many tiles of that MLP keep their pre-activations.
        fewer_if_small: nobody has given the number of tiles: that MLP has fewer in calls of little work.
        fp8: that MLP, or these experts, run in FP8, and this layer stays TransformerEngine's.
        overlap_steps: in at most so many steps of tokens that MLP's, or this layer's, communication runs
            behind its products; 0: it does not.
        least_overlap_tokens: of all ranks, from which on it does where that is more than two steps have.
        no_overlap: why not, where it was asked for. Fewer tokens than make two steps go by tiles.
        experts: how many grouped experts the row is of; ``shape`` is that of one's fc1.
        expert_tiles: at most so many tiles of them; 0 if they stayed dense.
        gathers_rows: their tokens are kept once, and the rows of a tile are gathered again in the backward pass.
        loss_tiles: of an output layer whose logits the loss takes tile by tile, and which does not use ``grid``.
    """

    name: str
    shape: tuple[int, int]
    element_size: int
    grid: TileGrid | None = None
    partitioned: bool = False
    reason: str = ""
    mlp: str | None = None
    kept_tiles: int = 0
    fewer_if_small: bool = False
    fp8: bool = False
    overlap_steps: int = 0
    least_overlap_tokens: int = 0
    no_overlap: str = ""
    experts: int = 0
    expert_tiles: int = 0
    gathers_rows: bool = False
    loss_tiles: HeadTiles | None = None

    @property
    def is_tiled(self) -> bool:
        return self.grid is not None or self.expert_tiles > 0

    @property
    def module(self) -> str:
        """As flags call it; empty for layers that have no flag."""
        if self.experts:
            return "experts"
        return MODULE_OF_ATTRIBUTE.get(self.name.rpartition(".")[2], "")

    def with_splits(self, splits: tuple[int, int]) -> Self:
        assert self.grid is not None
        return replace(self, grid=replace(self.grid, in_splits=splits[0], out_splits=splits[1]))

    @property
    def tile_bytes(self) -> int:
        """Of the largest tile, or of the whole weight if dense."""
        rows, columns = self.shape
        if self.grid is not None:
            rows, columns = self.grid.out_size(0), self.grid.in_size(0)
        return rows * columns * self.element_size


def table(reports: list[LayerReport]) -> str:
    """The startup table: module, dense shape, grid and tile MiB; equal layers of the model share a line.

    Shapes and grids are both written in x out. Below it, grids of fewer tiles for partitioned layers, if there are
    some that gather no more at once.
    """
    lines: dict[tuple[str, ...], int] = defaultdict(int)
    for report in reports:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", report.name)
        shape = " x ".join(map(str, reversed(report.shape)))
        grid, mib = str(report.grid or "dense"), f"{report.tile_bytes / MIB:.2f}"
        if report.experts:
            shape, mib, grid = f"{report.experts} x {shape}", "-", "-" if report.is_tiled else grid
        if report.loss_tiles is not None:
            grid = mib = "-"
        lines[pattern, shape, grid, mib, note(report)] += 1
    rows: list[tuple[str, ...]] = [("module", "layers", "features in x out", "tiles in x out", "tile MiB", "")]
    rows += [(pattern, str(count), *cells) for (pattern, *cells), count in lines.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = "\n".join("  ".join(cells).rstrip() for cells in padded)
    if coarser := coarser_splits(reports):
        text += "\nFewer tiles gather no more at once, and cost the host less. Grids to give for these modules: "
        text += as_flag(coarser)
    return text


def note(report: LayerReport) -> str:
    """How the tiles of a layer are used, or why there are none: the last column of the table."""
    if report.expert_tiles:
        words = f"TiledExperts{' in FP8' * report.fp8}, at most {report.expert_tiles} tiles of about as many rows"
        words = f"{words}, keep {_keep_note(report)}" + ", tokens kept once" * report.gathers_rows
        return words + _overlap_note(report)
    if report.grid is None:
        return report.reason
    notes = ["partitioned"] if report.partitioned else []
    if report.loss_tiles is not None:
        notes += [_loss_note(report.loss_tiles, report.shape[0]), *_steps_notes(report)]
    elif report.mlp is not None:
        tiles = report.grid.tiles
        notes.append("TiledMLP in FP8" if report.fp8 else "TiledMLP")
        notes.append(f"keep {_keep_note(report)}")
        if report.fewer_if_small and not report.overlap_steps:
            notes.append(f"at most {tiles} tiles")
        elif not (report.partitioned or report.fp8):
            notes.append(f"at most {report.overlap_steps or tiles} token steps")
        notes[-1] += _overlap_note(report)
    elif report.module == "output":
        notes += ["logits whole", *_steps_notes(report)]
    elif report.reason:
        notes.append("stock MLP")
    else:
        notes += _steps_notes(report)
    return ", ".join(notes) + (f": {report.reason}" if report.reason else "")


def _steps_notes(report: LayerReport) -> list[str]:
    """Of a layer outside an MLP, in how many steps it overlaps, or why not."""
    steps = f"at most {report.overlap_steps} token steps" if report.overlap_steps else ""
    # The loss gathers behind its first tile, if that needs the tokens of all ranks: the bound decides at each call.
    only = ", where one tile of logits has all tokens" if steps and report.loss_tiles is not None else ""
    note = f"{steps}{_overlap_note(report)}{only}".removeprefix(", ")
    return [note] if note else []


def _overlap_note(report: LayerReport) -> str:
    if report.no_overlap:
        return f", no overlap: {report.no_overlap}"
    if not report.overlap_steps:
        return ""
    tokens = max(2 * step_comm.LEAST_STEP_TOKENS, report.least_overlap_tokens)
    return f", communication behind products from {tokens} tokens on"


def _keep_note(report: LayerReport) -> str:
    tiles = report.expert_tiles if report.grid is None else report.grid.tiles
    return "all" if report.kept_tiles == tiles else str(report.kept_tiles)


def _loss_note(tiles: HeadTiles, vocabulary: int) -> str:
    tokens = "tokens" if tiles.tokens is None else f"{tiles.tokens} tokens"
    columns, bound = "columns", f" within {tiles.memory_mib or DEFAULT_HEAD_MEMORY_MIB} MiB"
    if tiles.vocabulary_tiles is not None:
        parts = partition_aligned(vocabulary, tiles.vocabulary_tiles)
        columns = f"{max(stop - start for start, stop in pairwise(parts))} columns"
        bound = "" if tiles.tokens is not None and tiles.memory_mib is None else bound
    keep = "what fits" if tiles.keep is None else tiles.keep
    return f"loss in tiles of {tokens} x {columns} of logits{bound}, keep {keep}"


def coarser_splits(reports: list[LayerReport]) -> dict[str, tuple[int, int]]:
    """Grids of fewer tiles for partitioned layers, none larger than what is gathered at once anyway, by module.

    Each tile costs host time in each pass. A tile of a ``TiledMLP``, one of fc1 and one of fc2, is gathered as one.
    """
    layers: defaultdict[str, list[LayerReport]] = defaultdict(list)
    units: defaultdict[str, int] = defaultdict(int)
    for report in reports:
        if report.partitioned:
            units[report.name if report.mlp is None else report.mlp] += report.tile_bytes
            layers[report.module].append(report)
    coarser = {}
    for module, of_module in layers.items():
        if not module or any(report.mlp is not None for report in of_module):
            continue
        axis = "in_splits" if module in ROW_MODULES else "out_splits"
        for tiles in range(1, min(getattr(report.grid, axis) for report in of_module)):
            splits = TilingConfig(factor=tiles).splits_of(module)
            if all(report.with_splits(splits).tile_bytes <= max(units.values()) for report in of_module):
                coarser[module] = splits
                break
    return coarser


def as_flag(splits: Mapping[str, tuple[int, int]]) -> str:
    """``{"fc1": (1, 8)}`` -> ``--tiled-linear-splits fc1=1x8``."""
    settings = (f"{module}={in_splits}x{out_splits}" for module, (in_splits, out_splits) in splits.items())
    return f"--tiled-linear-splits {' '.join(settings)}"

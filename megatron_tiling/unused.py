"""Settings that were given and that no layer of a model follows: the lines below the startup table.

What is without effect in any model is refused by ``TilingConfig``; here is what depends on the model. A stage of a
pipeline may lack the layers that follow a setting, so none of this ends a run.
"""

from collections.abc import Iterator, Sequence

from megatron_tiling.config import ATTENTION_MODULES, FLAGS, TilingConfig
from megatron_tiling.report import LayerReport

#: Fields of ``TilingConfig`` -> those of ``HeadTiles``.
_OF_THE_LOSS = {"head_memory_mib": "memory_mib", "head_keep": "keep", "head_tokens": "tokens"}


def settings_without_effect(config: TilingConfig, reports: Sequence[LayerReport]) -> list[str]:
    """Lines of the flag, its value, and why; none of a model, or of a stage, without linear layers.

    Why a layer is dense, a loss whole, or communication exposed, the table says of each layer.
    """
    return (
        [f"{setting} has no effect here: {reason}" for setting, reason in _unused(config, reports)] if reports else []
    )


def _unused(config: TilingConfig, reports: Sequence[LayerReport]) -> Iterator[tuple[str, str]]:
    there = {report.module for report in reports}
    looped = [report for report in reports if report.mlp is not None or report.expert_tiles]
    losses = [report.loss_tiles for report in reports if report.loss_tiles is not None]
    if isinstance(config.modules, tuple):
        for module in config.modules:
            if module not in there:
                yield f"{FLAGS['modules']} {module}", _none_of(module)
    for module in config.splits:
        if module not in there:
            yield f"{FLAGS['splits']} {config.setting_of(module)}", _none_of(module)
    if config.factor is not None and not any(_follows_factor(config, report) for report in reports):
        fixed = "; tiles of the loss: --tiled-linear-splits output=1xN" if losses else ""
        yield f"{FLAGS['factor']} {config.factor}", f"no layer has tiles by it{fixed}"
    if config.fp32_accumulate and not any(map(_sums_narrow, reports)):
        yield FLAGS["fp32_accumulate"], "there are no sums over tiles in bf16 or fp16"
    if config.mlp_keep is not None and not any(_keeps(config, report) for report in looped):
        yield f"{FLAGS['mlp_keep']} {config.mlp_keep}", "no MLP and no experts run in tiles that follow it"
    for name, of_tiles in _OF_THE_LOSS.items():
        value = getattr(config, name)
        if value is not None and not any(getattr(tiles, of_tiles) == value for tiles in losses):
            yield f"{FLAGS[name]} {value}", "no loss is computed in tiles that follow it"
    if config.fp8_hold_weights and not any(report.fp8 for report in looped):
        yield FLAGS["fp8_hold_weights"], "no MLP and no experts run in tiles in FP8"
    if config.overlap_steps and not any(report.overlap_steps or report.no_overlap for report in reports):
        yield f"{FLAGS['tp_overlap']} {config.tp_overlap}", "no layer that could overlap is tiled"


def _none_of(module: str) -> str:
    if module == "experts":
        return "there are none in grouped GEMMs (--moe-grouped-gemm); experts one by one are fc1 and fc2"
    return "there is no such layer"


def _follows_factor(config: TilingConfig, report: LayerReport) -> bool:
    """The tiles of a loss do not, and attention that overlaps is one tile by default."""
    module = report.module
    if module in config.splits or (config.overlap_steps and module in ATTENTION_MODULES):
        return False
    if report.expert_tiles:
        return report.expert_tiles == config.splits_of(module)[1]
    if report.grid is None or report.loss_tiles is not None:
        return False
    return (report.grid.in_splits, report.grid.out_splits) == config.splits_of(module)


def _sums_narrow(report: LayerReport) -> bool:
    """The loss sums in float32 anyway."""
    if report.element_size > 2 or report.loss_tiles is not None:
        return False
    several = report.grid is not None and report.grid.tiles > 1
    return bool(several or report.expert_tiles > 1 or (report.mlp is not None and report.overlap_steps))


def _keeps(config: TilingConfig, report: LayerReport) -> bool:
    tiles = report.expert_tiles if report.grid is None else report.grid.tiles
    return report.kept_tiles == (tiles if config.kept_tiles is None else config.kept_tiles)

"""The model-provider hook: ``tiling_hook`` and ``tiled_model_provider``, for scripts that build models themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tiling.config import TilingConfig
from megatron_tiling.convert import tile
from megatron_tiling.log import logger
from megatron_tiling.report import table
from megatron_tiling.resident.layers import TiledParallelLinear
from megatron_tiling.resident.mlp import TiledMLP
from megatron_tiling.unused import settings_without_effect

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]


def tiling_hook(config: TilingConfig) -> Hook:
    """A hook for ``pre_wrap_hooks`` of megatron-core's model configs (0.19): tiles each model chunk, in place."""

    def hook(chunks: ModelChunks) -> ModelChunks:
        for index, chunk in enumerate(chunks):
            reports = tile(chunk, config)
            lines = [table(reports), *settings_without_effect(config, reports)]
            _log_once_a_stage(f"tiled linear layers{_stage_name(index, len(chunks))}:\n" + "\n".join(lines))
        return chunks

    return hook


def tiled_model_provider(model_provider: Callable[..., Any], config: TilingConfig) -> Callable[..., Any]:
    """Wrap Megatron's ``model_provider(pre_process, post_process, ...)``: the model it builds comes out tiled."""
    return hooked(model_provider, tiling_hook(config))


def hooked(model_provider: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """``model_provider``, with a hook on what it builds."""

    @functools.wraps(model_provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        model = model_provider(*args, **kwargs)
        hook(model if isinstance(model, list) else [model])
        return model

    return provide


def was_tiled(chunk: torch.nn.Module) -> bool:
    """Whether a model chunk, wrapped or not, has been through ``tile``. One without linear layers may show no tiles."""
    modules = chunk.modules()
    return any(hasattr(module, "tiling_reports") or isinstance(module, TiledParallelLinear) for module in modules)


def reasons_for_no_tiles(chunks: ModelChunks) -> set[str] | None:
    """Why none of the layers of these chunks, which have been through ``tile``, is tiled; ``None`` if one is."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    reports = [report for module in modules for report in getattr(module, "tiling_reports", ())]
    tiled = any(isinstance(module, (TiledParallelLinear, TiledMLP)) for module in modules)
    if tiled or any(report.is_tiled for report in reports):  # grouped experts are neither of these
        return None
    return {report.reason for report in reports}


def _stage_name(chunk: int, chunks: int) -> str:
    names = []
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        names.append(f"pipeline stage {parallel_state.get_pipeline_model_parallel_rank()}")
    if chunks > 1:
        names.append(f"model chunk {chunk}")
    return f" of {', '.join(names)}" if names else ""


def _log_once_a_stage(message: str) -> None:
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if parallel_state.get_tensor_model_parallel_rank() == 0 and replica == 0:
        logger.info(message)

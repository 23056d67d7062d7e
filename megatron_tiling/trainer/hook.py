"""The model-provider hook: from Megatron's arguments to tiled models.

``tiling_hook`` and ``tiled_model_provider`` are for scripts that build models themselves. ``install`` puts them, and
the flags, into Megatron's trainer, for scripts that know nothing of this package.
"""

import functools
import importlib.util
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_tiling.arguments import add_tiling_args, validate_tiling_args
from megatron_tiling.config import TilingConfig, storage_of
from megatron_tiling.convert import tile
from megatron_tiling.report import table
from megatron_tiling.trainer import versions
from megatron_tiling.trainer.checkpoint_check import check_on_all_ranks
from megatron_tiling.trainer.norm import allow_sequence_parallel

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]


def tiling_hook(config: TilingConfig) -> Hook:
    """A hook for ``pre_wrap_hooks`` of megatron-core's model configs (0.19): tiles each model chunk, in place."""

    def hook(chunks: ModelChunks) -> ModelChunks:
        for index, chunk in enumerate(chunks):
            reports = tile(chunk, config)
            _print_once_a_stage(f"tiled linear layers{_stage_name(index, len(chunks))}:\n{table(reports)}")
        return chunks

    return hook


def tiled_model_provider(model_provider: Callable[..., Any], config: TilingConfig) -> Callable[..., Any]:
    """Wrap Megatron's ``model_provider(pre_process, post_process, ...)``: the model it builds comes out tiled."""
    return _hooked(model_provider, tiling_hook(config))


def _hooked(model_provider: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    @functools.wraps(model_provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        model = model_provider(*args, **kwargs)
        hook(model if isinstance(model, list) else [model])
        return model

    return provide


def install() -> None:
    """Add the flags to Megatron's argument parser, and tile the models that its trainer builds when they ask for it.

    Idempotent. To be called before the arguments are parsed. Bad settings end the program with one line.
    """
    import megatron.training.arguments as arguments
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training

    if getattr(training, "_megatron_tiling_installed", False):
        return
    training._megatron_tiling_installed = True
    _wrap(arguments.add_megatron_arguments, _with_tiling_args)
    _wrap(arguments.validate_args, _with_validation)
    _wrap(training.get_model, _with_tiled_provider)
    _wrap(checkpointing.load_checkpoint, _with_checked_checkpoint)
    _use_built_dataset_helpers()
    for config_from_args in versions.model_config_functions():
        _wrap(config_from_args, _with_tiling_hook)


def _wrap(function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Replace ``function`` by ``wrapper(function, ...)`` in every trainer module that holds it."""
    wrapped = functools.wraps(function)(functools.partial(wrapper, function))
    for name, module in list(sys.modules.items()):
        if name == "megatron.training" or name.startswith("megatron.training."):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, wrapped)


def _use_built_dataset_helpers() -> None:
    """The wheel ships the C++ dataset helpers built, but not the Makefile that the trainer calls to build them."""
    import megatron.core.datasets.utils as utils

    makefile = Path(utils.__file__).with_name("Makefile")
    if not makefile.exists() and _found("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = lambda: None


def _with_tiling_args(add_arguments: Callable[..., ArgumentParser], parser: ArgumentParser) -> ArgumentParser:
    return add_tiling_args(add_arguments(parser))


def _with_validation(validate: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    with _ending_in_one_line():
        config = validate_tiling_args(args)
        if config is not None and args.use_torch_fsdp2 and not versions.torch_fsdp2_trains():
            raise ValueError(
                "--use-torch-fsdp2: this megatron-core's FSDP2 wrapper does not go with its trainer; "
                "take 0.19, or give --use-megatron-fsdp"
            )
    validated = validate(args, *rest, **kwargs)
    if config is not None:
        _prepare(args)
    return validated


def _prepare(args: Namespace) -> None:
    """What a tiled run needs of Megatron beyond its layers."""
    partitioned = storage_of(args) == "partitioned"  # by an engine, which owns the gradients too
    args.tiled_linear_fuse_wgrad = args.gradient_accumulation_fusion and not partitioned
    if partitioned:
        from megatron_tiling.partitioned.wrappers import shard_by_tiles

        shard_by_tiles()
        if getattr(args, "save_wgrads_interval", None) or getattr(args, "save_params_interval", None):
            _print_rank_0("--save-wgrads-interval, --save-params-interval: partitioned tiles keep names of their own")
    if args.gradient_accumulation_fusion and not _found("fused_weight_gradient_mlp_cuda"):
        args.gradient_accumulation_fusion = False  # or the constructors of stock's layers raise
        _print_rank_0(
            "gradient accumulation fusion without apex: "
            + ("" if partitioned else "tiled layers add weight gradients to main_grad themselves, ")
            + f"layers {'partitioned or ' if partitioned else ''}left dense use plain weight gradients"
        )
    if args.sequence_parallel and not _found("apex") and not _found("transformer_engine"):
        allow_sequence_parallel()
        _print_rank_0("sequence parallelism without apex or TransformerEngine: torch norms, their weights marked")


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _trainer_hook(args: Namespace) -> Hook:
    hook = tiling_hook(TilingConfig.from_args(args, fuse_wgrad=args.tiled_linear_fuse_wgrad))

    def run(chunks: ModelChunks) -> ModelChunks:
        with _ending_in_one_line():
            tiled = hook(chunks)
            if args.use_torch_fsdp2 and (args.save or args.load or args.pretrained_checkpoint):
                from megatron_tiling.partitioned.torch_fsdp2 import refuse_ranks_without_rows

                for chunk in tiled:
                    refuse_ranks_without_rows(chunk)
            return tiled

    return run


@contextmanager
def _ending_in_one_line() -> Iterator[None]:
    """A bad setting ends a training run with what is wrong, not with a trace."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"megatron_tiling: {error}") from None


def _with_tiled_provider(get_model: Callable[..., Any], model_provider: Any, *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    if get_args().use_tiled_linear:
        model_provider = _hooked(model_provider, _trainer_hook(get_args()))
    return get_model(model_provider, *args, **kwargs)


def _with_tiling_hook(config_from_args: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    model_config = config_from_args(args, *rest, **kwargs)
    if args.use_tiled_linear:
        model_config.pre_wrap_hooks.append(_trainer_hook(args))
    return model_config


def _with_checked_checkpoint(
    load: Callable[..., Any],
    model: ModelChunks,
    optimizer: Any,
    scheduler: Any,
    load_arg: str = "load",
    strict: bool = True,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    from megatron.training import get_args
    from megatron.training.checkpointing import unwrap_model

    args = get_args()
    folder = check_on_all_ranks(args, load_arg, unwrap_model(model), strict) if args.use_tiled_linear else None
    loaded = load(model, optimizer, scheduler, load_arg, strict, *rest, **kwargs)
    if folder is not None and optimizer is not None and args.use_torch_fsdp2:
        from megatron_tiling.partitioned.torch_fsdp2 import restore_adam_step

        restore_adam_step(optimizer, folder)
    return loaded


def _stage_name(chunk: int, chunks: int) -> str:
    names = []
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        names.append(f"pipeline stage {parallel_state.get_pipeline_model_parallel_rank()}")
    if chunks > 1:
        names.append(f"model chunk {chunk}")
    return f" of {', '.join(names)}" if names else ""


def _print_once_a_stage(message: str) -> None:
    if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_data_parallel_rank() == 0:
        print(f"megatron_tiling: {message}", flush=True)


def _print_rank_0(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # arguments are parsed before torch.distributed is there
        print(f"megatron_tiling: {message}", flush=True)

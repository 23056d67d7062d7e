"""``install``: the flags, and what they ask for, in Megatron's trainer, for scripts that know nothing of this package.

What stands around a function of Megatron's takes it and the call, bound by its own signature: callers may use stock's
names, and see stock's signature. Without ``--use-tiled-linear`` nothing but the flags is added.
"""

import functools
import importlib
import inspect
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_tiling.arguments import add_tiling_args, meant_by, naming_what_was_meant, validate_tiling_args
from megatron_tiling.config import FLAGS, NOT_ASKED_FOR, VARIABLE, TilingConfig, argument_of, storage_of
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.trainer import versions
from megatron_tiling.trainer.checkpoint_check import check_on_all_ranks
from megatron_tiling.trainer.hook import Hook, ModelChunks, hooked, reasons_for_no_tiles, tiling_hook, was_tiled
from megatron_tiling.trainer.norm import allow_sequence_parallel
from megatron_tiling.trainer.out_of_memory import saying_what_fits
from megatron_tiling.trainer.planned import choose, to_check

Call = inspect.BoundArguments
Stock = Callable[..., Any]
Around = Callable[[Stock, Call], Any]

#: Attribute of a function that ``install`` has put in the place of Megatron's, which it holds.
MARK = "__megatron_tiling__"
CHECKPOINT_ARGUMENTS = ("ddp_model", "optimizer", "load_arg", "strict")
BUILT_ELSEWHERE = (
    "it was built past get_model and past the model configs; to tile it, give it to megatron_tiling.tile before it is "
    "wrapped"
)
FUSION_KERNELS = "fused_weight_gradient_mlp_cuda"  # apex's


def install() -> None:
    """Add the flags to Megatron's argument parser, and tile the models that its trainer builds when they ask for it.

    Idempotent. To be called before the arguments are parsed; modules that have imported what it wraps get the new
    functions too. Bad settings end the program with one line.

    Raises:
        ImportError: this Megatron lacks a function that is to be wrapped, or one of its arguments, naming it.
    """
    targets: list[tuple[str, str, Around, tuple[str, ...]]] = [
        ("megatron.training.arguments", "add_megatron_arguments", _with_flags, ()),
        ("megatron.training.arguments", "validate_args", _with_validation, ("args",)),
        ("megatron.training.arguments", "core_transformer_config_from_args", _without_missing_fusion, ("args",)),
        ("megatron.training.yaml_arguments", "load_yaml", _with_flags_of_yaml, ()),
        ("megatron.training.yaml_arguments", "validate_yaml", _with_validation_of_yaml, ()),
        ("megatron.training.yaml_arguments", "core_transformer_config_from_yaml", _without_missing_fusion, ("args",)),
        ("megatron.training.training", "get_model", _with_tiled_provider, ("model_provider_func",)),
        ("megatron.training.training", "setup_model_and_optimizer", _with_check_of_built_model, ()),
        ("megatron.training.training", "train_step", _with_check_of_model, ()),
        ("megatron.training.checkpointing", "load_checkpoint", _with_checked_checkpoint, CHECKPOINT_ARGUMENTS),
        ("megatron.core.datasets.utils", "compile_helpers", _unless_built, ()),
        *((module, name, _with_tiling_hook, ("pre_wrap_hook",)) for module, name in versions.builders_of_configs()),
    ]
    replaced = [wrap(importlib.import_module(module), name, around, reads) for module, name, around, reads in targets]
    replace_in_all_modules({id(getattr(wrapped, MARK)): wrapped for wrapped in replaced})


def wrap(module: ModuleType, name: str, around: Around, reads: tuple[str, ...]) -> Any:
    """Put ``around(stock, call)`` in the place of a module's function, unless it is there already; return it.

    Args:
        reads: the arguments that ``around`` looks for.

    Raises:
        ImportError: there is no such function, or it lacks these arguments.
    """
    stock = getattr(module, name, None)
    if stock is None:
        raise ImportError(f"{module.__name__} has no {name}: megatron_tiling knows megatron-core 0.16 to 0.19")
    if hasattr(stock, MARK):
        return stock
    signature = inspect.signature(stock)
    if lacking := [argument for argument in reads if argument not in signature.parameters]:
        raise ImportError(
            f"{module.__name__}.{name} is {stock!r}, which takes no {lacking[0]}; if it has been put in the place of "
            "Megatron's own, call megatron_tiling.install() before that, or use functools.wraps there"
        )

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return around(stock, call)

    setattr(wrapped, MARK, stock)
    setattr(module, name, wrapped)
    return wrapped


def replace_in_all_modules(replacements: dict[int, Any]) -> None:
    """Whoever has imported one of the functions, a script above its call of ``install`` too, gets the new one."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if id(value) in replacements:
                names[name] = replacements[id(value)]


def _run(stock: Stock, call: Call) -> Any:
    return stock(*call.args, **call.kwargs)


def _args_that_tile() -> Namespace | None:
    """Megatron's arguments, if they ask for tiling."""
    from megatron.training.global_vars import get_args

    try:
        args: Namespace = get_args()
    except AssertionError:  # there are none: Megatron's functions are used without its trainer
        return None
    return args if getattr(args, "use_tiled_linear", False) else None


def _with_flags(stock: Stock, call: Call) -> ArgumentParser:
    return naming_what_was_meant(add_tiling_args(_run(stock, call)))


def _with_flags_of_yaml(stock: Stock, call: Call) -> Any:
    """A file may have our flags as keys (``use_tiled_linear: true``), which are read as the command line would be."""
    args = _run(stock, call)
    parser = add_tiling_args(ArgumentParser(str(args.yaml_cfg), add_help=False, allow_abbrev=False))
    argv: list[str] = []
    known = {argument_of(option) for action in parser._actions for option in action.option_strings}
    for key in vars(args).keys() - known:
        if "til" in key and (near := meant_by(f"--{key}")):  # Megatron's gated_linear_unit is spelled like one, too
            raise SystemExit(f"megatron_tiling: --yaml-cfg {args.yaml_cfg}: is {key} {argument_of(near)}?")
    for action in parser._actions:
        for option in action.option_strings:
            value = getattr(args, argument_of(option), None)
            if action.nargs == 0:
                argv += [option] if value else []
            elif value is not None:
                argv += [option, *map(str, value if isinstance(value, list) else [value])]
    if parser.parse_known_args()[0] != parser.parse_args([]):
        raise SystemExit(f"megatron_tiling: --yaml-cfg: flags are read from {args.yaml_cfg} alone; write them into it")
    vars(args).update(vars(parser.parse_args(argv)))
    return args


def _with_validation(stock: Stock, call: Call) -> Any:
    args = call.arguments["args"]
    config = _validated(args)
    validated = _run(stock, call)
    if config is not None:
        _prepare(args)
    return validated


def _with_validation_of_yaml(stock: Stock, call: Call) -> Any:
    args = _run(stock, call)  # before, most of them are in sections
    if _validated(args) is not None:
        _prepare(args)
    return args


def _validated(args: Namespace) -> TilingConfig | None:
    if os.environ.get(VARIABLE) and not getattr(args, "custom_model_provider_path", None):  # slime's, which reads it
        log_on_rank_0(f"{VARIABLE} is set, and has no effect on runs of Megatron's own trainer: give flags")
    with _ending_in_one_line():
        config = validate_tiling_args(to_check(args))
        if config is not None and getattr(args, "use_torch_fsdp2", False) and not versions.torch_fsdp2_trains():
            raise ValueError(
                "--use-torch-fsdp2: this megatron-core's FSDP2 wrapper does not go with its trainer; "
                "take 0.19, or give --use-megatron-fsdp"
            )
        return config


def _prepare(args: Namespace) -> None:
    """What a tiled run needs of Megatron beyond its layers. Idempotent."""
    partitioned = storage_of(args) == "partitioned"
    if partitioned:
        from megatron_tiling.partitioned.wrappers import shard_by_tiles

        shard_by_tiles()
        if getattr(args, "save_wgrads_interval", None) or getattr(args, "save_params_interval", None):
            log_on_rank_0("--save-wgrads-interval, --save-params-interval: partitioned tiles keep names of their own")
    if args.gradient_accumulation_fusion and not versions.exists(FUSION_KERNELS):
        log_on_rank_0(
            "gradient accumulation fusion without apex: "
            + ("layers partitioned or" if partitioned else "tiled layers add weight gradients to main_grad, layers")
            + " left dense use plain weight gradients"
        )
    if args.sequence_parallel and not versions.exists("apex") and not versions.exists("transformer_engine"):
        allow_sequence_parallel()
        log_on_rank_0("sequence parallelism without apex or TransformerEngine: torch norms, their weights marked")


def _without_missing_fusion(stock: Stock, call: Call) -> Any:
    """A model config without gradient accumulation fusion where stock's layers, whose constructors raise, lack apex.

    Tiled layers do without apex, and follow the arguments.
    """
    config = _run(stock, call)
    tiled = getattr(call.arguments["args"], "use_tiled_linear", False)
    if tiled and not versions.exists(FUSION_KERNELS):
        config.gradient_accumulation_fusion = False
    return config


def _trainer_hook(args: Namespace) -> Hook:
    with _ending_in_one_line():
        choose(args)
    resident = storage_of(args) == "resident"  # else an engine owns the gradients
    hook = tiling_hook(TilingConfig.from_args(args, fuse_wgrad=resident and args.gradient_accumulation_fusion))

    def run(chunks: ModelChunks) -> ModelChunks:
        with _ending_in_one_line():
            tiled = hook(chunks)
            if getattr(args, "use_torch_fsdp2", False) and (args.save or args.load or args.pretrained_checkpoint):
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


def _with_tiled_provider(stock: Stock, call: Call) -> Any:
    if args := _args_that_tile():
        provider = call.arguments["model_provider_func"]
        call.arguments["model_provider_func"] = hooked(provider, _trainer_hook(args))
    return _run(stock, call)


def _with_tiling_hook(stock: Stock, call: Call) -> Any:
    if args := _args_that_tile():
        ours, theirs = _trainer_hook(args), call.arguments["pre_wrap_hook"]
        call.arguments["pre_wrap_hook"] = ours if theirs is None else lambda chunks: theirs(ours(chunks))
    return _run(stock, call)


def _with_check_of_built_model(stock: Stock, call: Call) -> Any:
    args = _args_that_tile()
    with saying_what_fits(args, building=True):
        built = _run(stock, call)
    _refuse_untiled(built[0])
    if args is not None:
        everyone: list[set[str] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, reasons_for_no_tiles(built[0]))
        if None not in everyone:  # on no pipeline stage
            reasons = sorted(set().union(*filter(None, everyone)))
            other = f", or name other layers in {FLAGS['modules']}" if NOT_ASKED_FOR in reasons else ""
            raise SystemExit(
                "megatron_tiling: --use-tiled-linear: no layer of this model can be tiled "
                f"({'; '.join(reasons)}); leave it out{other}"
            )
    return built


def _with_check_of_model(stock: Stock, call: Call) -> Any:
    _refuse_untiled(call.arguments.get("model", []))  # not named, if somebody has put a function around it
    with saying_what_fits(_args_that_tile()):
        return _run(stock, call)


def _refuse_untiled(model: ModelChunks) -> None:
    if _args_that_tile() and not all(map(was_tiled, model)):
        raise SystemExit(f"megatron_tiling: --use-tiled-linear is given, and the model is not tiled: {BUILT_ELSEWHERE}")


def _with_checked_checkpoint(stock: Stock, call: Call) -> Any:
    args = _args_that_tile()
    if args is None:
        return _run(stock, call)
    from megatron.training.checkpointing import unwrap_model

    ddp_model, optimizer, load_arg, strict = (call.arguments[name] for name in CHECKPOINT_ARGUMENTS)
    model = unwrap_model(ddp_model)
    if not all(map(was_tiled, model)):
        if any(next(chunk.parameters(), None) is not None for chunk in model):  # zero3.load_dense's stand-in has none
            log_on_rank_0(f"a model that is not tiled takes a checkpoint: {BUILT_ELSEWHERE}")
        return _run(stock, call)
    folder = check_on_all_ranks(args, load_arg, model, strict)
    loaded = _run(stock, call)
    if folder is not None and optimizer is not None and getattr(args, "use_torch_fsdp2", False):
        from megatron_tiling.partitioned.torch_fsdp2 import restore_adam_step

        restore_adam_step(optimizer, folder)
    return loaded


def _unless_built(stock: Stock, call: Call) -> None:
    """The wheel ships the C++ dataset helpers built, but not the Makefile that the trainer calls to build them."""
    makefile = Path(inspect.getfile(stock)).with_name("Makefile")
    if makefile.exists() or not versions.exists("megatron.core.datasets.helpers_cpp"):
        _run(stock, call)

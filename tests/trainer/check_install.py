"""What ``install`` wraps, called by stock's own names, as Megatron's inference utilities and converters do.

torchrun --standalone --nproc-per-node 1 -m tests.trainer.check_install FOLDER

Every check runs in one process group, on each supported version (test_versions.py).
"""

import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

# Imported before install() is called, as an import sorter has it.
from megatron.training import arguments, get_args, get_model, global_vars, training, yaml_arguments
from megatron.training.arguments import core_transformer_config_from_args, validate_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.training import setup_model_and_optimizer, train_step

import megatron_tiling
from megatron_tiling import cpu
from megatron_tiling.arguments import add_tiling_args
from megatron_tiling.resident.lm_head import TiledOutputLayer
from megatron_tiling.trainer import versions
from megatron_tiling.trainer.install import MARK
from tests.support.harness import leave
from tests.support.training import COMMON

WRAPPED = {
    "megatron.training.arguments": ["add_megatron_arguments", "validate_args", "core_transformer_config_from_args"],
    "megatron.training.training": ["get_model", "setup_model_and_optimizer", "train_step"],
    "megatron.training.checkpointing": ["load_checkpoint"],
    "megatron.training.yaml_arguments": ["load_yaml", "validate_yaml", "core_transformer_config_from_yaml"],
    "megatron.core.datasets.utils": ["compile_helpers"],
}
FLAGS = "--global-batch-size 4 --train-iters 2 --use-cpu-initialization --no-load-optim --no-load-rng --save-interval 9"
TILED = ["--use-tiled-linear", "--tile-factor", "2"]
UNTILED = "megatron_tiling: --use-tiled-linear is given, and the model is not tiled: .* give it to megatron_tiling.*"


def provider(pre_process: bool = True, post_process: bool = True, config: Any = None, **kwargs: Any) -> GPTModel:
    config = config or core_transformer_config_from_args(args=get_args())
    return GPTModel(config, get_gpt_layer_local_spec(), 128, 24, pre_process, post_process)


@contextmanager
def ends_with(pattern: str) -> Iterator[None]:
    try:
        yield
    except SystemExit as ending:
        assert re.fullmatch(pattern, str(ending)), ending
    else:
        raise AssertionError("it went on")


def logits(model: list[torch.nn.Module]) -> torch.Tensor:
    tokens = torch.arange(24).unsqueeze(0)
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model[0].eval()(tokens, tokens, mask) * 1


def check_signatures() -> None:
    """One function a target, with stock's signature, put once, also where it had been imported."""
    stock = {
        (module, name): getattr(importlib.import_module(module), name) for module in WRAPPED for name in WRAPPED[module]
    }
    megatron_tiling.install()
    first = {(module, name): getattr(importlib.import_module(module), name) for module, name in stock}
    megatron_tiling.install()
    for (module, name), function in stock.items():
        wrapped = getattr(sys.modules[module], name)
        assert wrapped is first[module, name] and getattr(wrapped, MARK) is function
        assert inspect.signature(wrapped) == inspect.signature(function)
        if name in globals():
            assert globals()[name] is wrapped, name


def check_parsing() -> None:
    parser = arguments.add_megatron_arguments(parser=ArgumentParser(allow_abbrev=False))
    assert parser.parse_args(["--tile-factor", "3"]).tile_factor == 3
    bare = parser.parse_args([*COMMON, "--use-tiled-linear", "--tile-factor", "0"])
    with ends_with("megatron_tiling: --tile-factor 0: must be a whole number of at least 1; .*"):
        validate_args(args=bare, defaults={})


def check_start() -> None:
    """Megatron as it starts. Validation leaves what the user asks for: who validates again finds the same."""
    sys.argv = ["script", *cpu.with_default_args([*COMMON, *FLAGS.split(), "--save", sys.argv[1]]), *TILED]
    said = StringIO()
    with redirect_stdout(said):
        if hasattr(arguments, "parse_and_validate_args"):
            arguments.parse_and_validate_args()
        training.initialize_megatron()
        args = get_args()
    word = "megatron_tiling: gradient accumulation fusion without apex: tiled layers add"
    assert (word in said.getvalue()) == (torch.distributed.get_rank() == 0)
    assert args.gradient_accumulation_fusion
    assert not core_transformer_config_from_args(args=args).gradient_accumulation_fusion


def check_generation_from_a_dense_checkpoint() -> None:
    """As megatron.inference.utils.get_model_for_inference: both functions by stock's names."""
    args = get_args()
    args.use_tiled_linear = args.gradient_accumulation_fusion = False
    dense = get_model(model_provider_func=provider, wrap_with_ddp=False)
    save_checkpoint(1, dense, None, None, 0)
    expected = logits(dense)
    for tiled in (False, True):
        args.use_tiled_linear = args.gradient_accumulation_fusion = tiled
        args.load = args.save
        torch.manual_seed(99)
        model = get_model(model_provider_func=provider, model_type=args.model_type, wrap_with_ddp=False, config=None)
        assert isinstance(model[0].output_layer, TiledOutputLayer) == tiled
        assert not tiled or model[0].decoder.layers[0].mlp.linear_fc1.gradient_accumulation_fusion
        assert not torch.allclose(logits(model), expected, atol=1e-2)
        load_checkpoint(ddp_model=model, optimizer=None, opt_param_scheduler=None, strict=True)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    args.load = None


def check_an_untiled_model_is_refused() -> None:
    """Wherever it came from: built by hand, or through a function that somebody put in the place of Megatron's."""
    args = get_args()
    args.use_tiled_linear, dense = True, [provider()]
    step = inspect.signature(train_step).parameters
    required = {name: None for name, parameter in step.items() if parameter.default is parameter.empty}
    with ends_with(UNTILED):
        train_step(**required | {"model": dense})
    wrapped, training.get_model = training.get_model, lambda *args, **kwargs: dense
    try:
        args.skip_train = True  # no optimizer
        with ends_with(UNTILED):
            setup_model_and_optimizer(model_type=args.model_type, model_provider_func=provider)
    finally:
        training.get_model, args.skip_train = wrapped, False
    args.load = args.save
    for word in ("a model that is not tiled takes a checkpoint", ""):
        with torch.no_grad():
            for parameter in dense[0].parameters():
                parameter.zero_()
        with redirect_stdout(StringIO()) as said:
            load_checkpoint(ddp_model=dense, optimizer=None, opt_param_scheduler=None)
        assert (
            ("not tiled" in said.getvalue()) == bool(word) and word in said.getvalue()
        ) or torch.distributed.get_rank()
        assert all(parameter.any() for name, parameter in dense[0].named_parameters() if name.endswith("weight"))
        megatron_tiling.tile(dense[0], megatron_tiling.TilingConfig(factor=2))
    args.load = None


def check_without_arguments() -> None:
    """Functions of Megatron's are also used by libraries that have no arguments of its trainer."""
    stock, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, None
    try:
        for module, name in versions.builders_of_configs():
            build = getattr(sys.modules[module], name)
            try:
                build(build_model_func=None, transformer_config=None, pg_collection=None, wrap_with_ddp=False)
            except AttributeError as error:
                assert "NoneType" in str(error)  # stock's own look at the process groups
    finally:
        global_vars._GLOBAL_ARGS = stock


def yaml_file(file: Path, **settings: Any) -> Path:
    """The arguments of this run as a file has them: those of a model config in sections. JSON is YAML."""
    given = {name: value for name, value in vars(arguments.parse_args()).items() if is_plain(value)}
    sections: dict[str, dict[str, Any]] = {"model_parallel": {"params_dtype": None}, "language_model": {}}
    parallel = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    for field in dataclasses.fields(TransformerConfig):
        value = given.get(field.name, field.default)
        if is_plain(value) and field.name != "account_for_embedding_in_pipeline_split":  # which stock wants outside
            sections["model_parallel" if field.name in parallel else "language_model"][field.name] = value
            given.pop(field.name, None)
    for name in ("yaml_cfg", *vars(add_tiling_args(ArgumentParser()).parse_args([]))):
        del given[name]
    file = file.with_name(f"{file.stem}.{os.environ['RANK']}.yaml")
    file.write_text(json.dumps(given | sections | settings))
    return file


def is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def check_yaml(folder: Path) -> None:
    """Arguments from a file: stock's parser, and so ours, never sees them."""
    tiled = {"use_tiled_linear": True, "tile_factor": "3", "tiled_mlp_keep": 0, "tiled_linear_splits": ["fc1=1x5"]}
    tiled["tiled_linear_modules"] = ["all"]
    files = {
        "dense": yaml_file(folder / "dense.yaml", gated_linear_units=False),  # like tiled_linear_splits
        "tiled": yaml_file(folder / "tiled.yaml", **tiled),
        "zero": yaml_file(folder / "zero.yaml", memory_centric_tiled_linear=True, tile_factor=0),
        "lonely": yaml_file(folder / "lonely.yaml", tiled_mlp_keep=0),
        "misspelled": yaml_file(folder / "misspelled.yaml", use_tiled_linear=True, tiled_mlp_kept=0),
        "dashes": yaml_file(folder / "dashes.yaml", **{"use-tiled-linear": True}),
    }
    without = sys.argv[: -len(TILED)]

    def read(name: str, *flags: str) -> Namespace:
        sys.argv = [*without, "--yaml-cfg", str(files[name]), *flags]
        return yaml_arguments.validate_yaml(args=arguments.parse_args(), defaults={})

    with ends_with("megatron_tiling: --tile-factor 0: must be a whole number of at least 1; .*"):
        read("zero")
    with ends_with("megatron_tiling: --tiled-mlp-keep does nothing without --use-tiled-linear.*"):
        read("lonely")
    with ends_with(f"megatron_tiling: --yaml-cfg: flags are read from {files['dense']} alone.*"):
        read("dense", "--use-tiled-linear")
    with ends_with(f"megatron_tiling: --yaml-cfg {files['misspelled']}: is tiled_mlp_kept tiled_mlp_keep.$"):
        read("misspelled")
    with ends_with(f"megatron_tiling: --yaml-cfg {files['dashes']}: is use-tiled-linear use_tiled_linear.$"):
        read("dashes")
    stock = global_vars._GLOBAL_ARGS
    for name in ("dense", "tiled"):
        global_vars._GLOBAL_ARGS = args = read(name)
        assert args.use_tiled_linear == (name == "tiled")
        args.gradient_accumulation_fusion = name == "tiled"
        model = get_model(model_provider_func=provider, wrap_with_ddp=False)[0]
        assert isinstance(model.output_layer, TiledOutputLayer) == (name == "tiled")
    assert str(model.decoder.layers[0].mlp.linear_fc1.grid) == "1x5"
    assert str(model.decoder.layers[0].self_attention.linear_qkv.grid) == "1x3"
    global_vars._GLOBAL_ARGS = stock


def main() -> None:
    folder = Path(sys.argv[1])
    cpu.install()
    torch.set_num_threads(1)
    check_signatures()
    check_parsing()
    check_start()
    check_generation_from_a_dense_checkpoint()
    check_an_untiled_model_is_refused()
    check_without_arguments()
    check_yaml(folder)
    print("install checks passed")
    leave()


if __name__ == "__main__":
    main()

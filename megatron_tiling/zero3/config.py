"""DeepSpeed's configuration for tiled ZeRO-3: what the run's flags and its tile size say, and what defeats tiling.

Pure data: no process group, no DeepSpeed. Numbers of parameters are elements, as in DeepSpeed's configuration.

ZeRO-3 gathers a parameter around its use, but by default it also keeps what will be used again within 1e9 elements,
fetches 5e7 elements ahead and never partitions what is smaller than 1e5. All of these must be below a tile, or whole
layers are alive in spite of the tiles.
"""

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

#: DeepSpeed's own default.
DEFAULT_PERSISTENCE = 100_000
#: Gradients are reduced together up to this size: every reduction costs the host half a millisecond, and the engine
#: waits for the second last one before it starts another.
LEAST_REDUCE_BUCKET = 200_000_000


@dataclass(frozen=True)
class TileSizes:
    """Elements on a tensor-parallel rank: the smallest weight of a tile, the largest tile, the largest tiled layer."""

    smallest: int
    largest: int
    layer: int


def engine_config(path: str | Path, args: Namespace, data_parallel_size: int) -> Config:
    """The JSON file ``path``, completed by Megatron's flags: batch sizes, clipping and precision.

    What the file leaves out or sets to ``"auto"`` follows the flags, so that there is one place to change it.

    Raises:
        ValueError: no such file, or no JSON in it, not ZeRO stage 3, a value that contradicts a flag, NVMe offload
            without a path, or an optimizer on NVMe whose states are to be saved or loaded.
    """
    try:
        config: Config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed-config {path}: a JSON file is wanted ({error})") from None
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ValueError(
            f"{path}: zero_optimization.stage is {zero.get('stage')}, tiles are partitioned by stage 3 only"
        )
    for name in ("offload_param", "offload_optimizer"):
        offload = zero.get(name) or {}
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise ValueError(f"{path}: zero_optimization.{name}.device is nvme: give {name}.nvme_path, a folder on it")
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        for flag in ("save", "load"):
            if getattr(args, flag) is not None:
                raise ValueError(
                    f"{path}: zero_optimization.offload_optimizer.device is nvme, with --{flag} {getattr(args, flag)}: "
                    "DeepSpeed does not restore what it keeps there; offload the optimizer to cpu, or exchange weights "
                    "by zero3.save_dense and zero3.load_dense"
                )
    samples = args.micro_batch_size * data_parallel_size
    for key, value, flag in (
        ("train_micro_batch_size_per_gpu", args.micro_batch_size, "--micro-batch-size"),
        ("gradient_accumulation_steps", args.global_batch_size // samples, "--global-batch-size"),
        ("train_batch_size", args.global_batch_size, "--global-batch-size"),
        ("gradient_clipping", args.clip_grad, "--clip-grad"),
    ):
        _settle(config, key, value, flag, path)
    for key, wanted, flag in (("bf16", args.bf16, "--bf16"), ("fp16", args.fp16, "--fp16")):
        section = config.setdefault(key, {})
        _settle(section, "enabled", bool(wanted), flag, f"{path}: {key}")
    if args.fp16:
        if args.loss_scale is not None:
            _settle(config["fp16"], "loss_scale", args.loss_scale, "--loss-scale", f"{path}: fp16")
        config["fp16"].setdefault("loss_scale", 0)
        config["fp16"].setdefault("initial_scale_power", int(math.log2(args.initial_loss_scale)))
        config["fp16"].setdefault("loss_scale_window", args.loss_scale_window)
    return config


def _settle(section: Config, key: str, value: Any, flag: str, place: object) -> None:
    if section.get(key, "auto") == "auto":
        section[key] = value
    elif section[key] != value:
        raise ValueError(f"{place}: {key} is {section[key]}, but {flag} makes it {value}; set one of them to the other")


def with_thresholds(config: Mapping[str, Any], sizes: TileSizes) -> Config:
    """A copy of ``config`` whose unset or ``"auto"`` ZeRO-3 thresholds follow the tile size.

    One tile is fetched ahead of the one in use. A fetch is started while fewer than ``stage3_max_live_parameters``
    elements are alive, and brings up to one tile: with a limit of one tile, no more than two are alive. A reuse
    distance of 1 keeps a tile that is the next to be used again, as the last one of a forward pass is. Nothing is
    fetched ahead from NVMe, where DeepSpeed would start the same read twice and end the run.
    """
    zero = config["zero_optimization"]
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    following = {
        "stage3_max_live_parameters": sizes.largest + 1,
        "stage3_max_reuse_distance": 1,
        "stage3_prefetch_bucket_size": 0 if on_disk else sizes.largest,
        "stage3_param_persistence_threshold": min(DEFAULT_PERSISTENCE, sizes.smallest - 1),
        "reduce_bucket_size": max(sizes.largest, LEAST_REDUCE_BUCKET),
    }
    unset = {key: value for key, value in following.items() if zero.get(key, "auto") == "auto"}
    return dict(config) | {"zero_optimization": zero | unset}


def without_auto(config: Mapping[str, Any]) -> Config:
    """A copy of ``config`` that leaves ``"auto"`` settings of ZeRO to DeepSpeed's defaults: it knows no such value."""
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    return dict(config) | {"zero_optimization": zero}


def pointless_settings(config: Mapping[str, Any], sizes: TileSizes) -> list[str]:
    """Reasons, one line each, why whole layers would be alive under this complete ``config``, in spite of the tiles."""
    zero = config["zero_optimization"]
    tile = f"a tile has {sizes.largest} elements"
    remedy = "leave it out, or set it to auto"
    reasons = []
    persistent = zero["stage3_param_persistence_threshold"]
    if persistent >= sizes.smallest:
        reasons.append(
            f"stage3_param_persistence_threshold {persistent}: tiles of {sizes.smallest} elements stay on every rank, "
            f"never partitioned; {remedy}"
        )
    reuse = zero["stage3_max_reuse_distance"]
    if reuse >= sizes.largest:
        reasons.append(
            f"stage3_max_reuse_distance {reuse}: {tile}, and tiles that are used again within {reuse} elements stay "
            f"gathered; {remedy}"
        )
    ahead = min(zero["stage3_prefetch_bucket_size"], zero["stage3_max_live_parameters"])
    if ahead > 2 * sizes.largest:
        reasons.append(
            f"stage3_prefetch_bucket_size {zero['stage3_prefetch_bucket_size']} and stage3_max_live_parameters "
            f"{zero['stage3_max_live_parameters']}: {tile}, and {ahead} elements are fetched ahead of their use"
            f"{' (a whole layer has ' + str(sizes.layer) + ')' if ahead >= sizes.layer else ''}; {remedy}"
        )
    if granularity := zero.get("stage3_module_granularity_threshold", 0):
        reasons.append(
            f"stage3_module_granularity_threshold {granularity}: layers gathered as one unit hold all their tiles at "
            "once; leave it out"
        )
    if zero.get("leaf_module"):
        reasons.append("leaf_module: a module gathered as one unit holds all its tiles at once; leave it out")
    return reasons

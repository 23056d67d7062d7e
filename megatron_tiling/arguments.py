"""The command-line flags, and what is refused before training starts."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from megatron_tiling.config import DEFAULT_FACTOR, DEFAULT_HEAD_MEMORY_MIB, MODULES, STORAGES, TilingConfig

#: Flags that mean nothing without --use-tiled-linear; all of them default to None or False.
COMPANIONS = {
    "tile_factor": "--tile-factor",
    "tiled_linear_modules": "--tiled-linear-modules",
    "tiled_linear_splits": "--tiled-linear-splits",
    "tiled_linear_fp32_accumulate": "--tiled-linear-fp32-accumulate",
    "tiled_mlp_keep": "--tiled-mlp-keep",
    "tiled_head_memory_mib": "--tiled-head-memory-mib",
    "tiled_head_tokens": "--tiled-head-tokens",
    "tiled_linear_storage": "--tiled-linear-storage",
}

#: Megatron flags that tiled layers do not work with: attribute, values that are fine, what to do instead.
UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "transformer_impl",
        (None, "local", "transformer_engine"),
        "this implementation's layers cannot be tiled; use --transformer-impl local or transformer_engine",
    ),
    (
        "defer_embedding_wgrad_compute",
        (None, False),
        "a tiled layer computes its weight gradient in its own backward pass; leave this flag out",
    ),
    ("tensor_parallel_num_weight_shards", (None, 1), "a tiled layer needs its weight whole; leave this flag out"),
    (
        "expert_tensor_parallel_num_weight_shards",
        (None, 1),
        "a tiled layer needs its weight whole; leave this flag out",
    ),
)


def _no_checkpoints(remedy: str) -> tuple[tuple[str, tuple[Any, ...], str], ...]:
    return tuple((argument, (None,), remedy) for argument in ("save", "load", "pretrained_checkpoint"))


#: The same where Megatron-FSDP or torch FSDP2 is to shard the tiles.
UNSUPPORTED_WHEN_SHARDED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("tiled_linear_storage", (None, "auto", "partitioned"), "only partitioned tiles are sharded; leave it out"),
    ("init_model_with_meta_device", (None, False), "tiles are cut from weights that exist; leave it out"),
    (
        "overlap_moe_expert_parallel_comm",
        (None, False),
        "it runs parts of a layer past the modules that tiles are sharded by; leave it out",
    ),
)
UNSUPPORTED_WITH_MEGATRON_FSDP: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "data_parallel_sharding_strategy",
        ("optim_grads_params",),
        "weights stay whole, and tiles are not sharded; give --data-parallel-sharding-strategy optim_grads_params",
    ),
    ("pipeline_model_parallel_size", (None, 1), "Megatron-FSDP makes no device mesh of pipeline stages; leave it out"),
    ("num_distributed_optimizer_instances", (None, 1), "tiles are sharded over all data-parallel ranks; leave it out"),
    ("nccl_ub", (None, False), "its buffers are of one size, and tiles are not; leave it out"),
    ("fsdp_double_buffer", (None, False), "its buffers are of one size, and tiles are not; leave it out"),
    (
        "megatron_fsdp_max_pool_double_buffer",
        (None, False),
        "its buffers are of one size, and tiles are not; leave it out",
    ),
    *_no_checkpoints(
        "its shards of tiles are not mapped to and from dense checkpoints; leave it out, or give --use-torch-fsdp2"
    ),
)
UNSUPPORTED_WITH_FSDP2: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("ckpt_format", (None, "torch_dist"), "tiles would show in the checkpoint; give --ckpt-format torch_dist"),
)
UNSUPPORTED_WITH_FSDP2_AND_EXPERTS = _no_checkpoints(
    "stock Megatron saves and loads no experts that FSDP2 shards; leave it out"
)


@dataclass(frozen=True)
class TransformerEngineOption:
    """What TransformerEngine's layers do, and tiled layers do not.

    Attributes:
        flag: as the command line has it.
        argument: its attribute of the parsed arguments.
        setting: its attribute of Megatron's model config.
    """

    flag: str
    argument: str
    setting: str

    def refuse(self, value: Any) -> None:
        """Raise a ValueError if the value asks for it."""
        if value:
            given = f"{self.flag} {value}" if isinstance(value, str) else self.flag
            raise ValueError(f"--use-tiled-linear with {given}: tiled layers do not do this; leave the flag out")


TRANSFORMER_ENGINE_OPTIONS = (
    TransformerEngineOption("--fp8-format", "fp8", "fp8"),
    TransformerEngineOption("--fp4-format", "fp4", "fp4"),
    TransformerEngineOption("--te-precision-config-file", "te_precision_config_file", "quant_recipe"),
    TransformerEngineOption("--tp-comm-overlap", "tp_comm_overlap", "tp_comm_overlap"),
    TransformerEngineOption("--delay-wgrad-compute", "delay_wgrad_compute", "delay_wgrad_compute"),
    TransformerEngineOption("--symmetric-ar-type", "symmetric_ar_type", "symmetric_ar_type"),
    TransformerEngineOption(
        "--use-transformer-engine-op-fuser", "use_transformer_engine_op_fuser", "use_transformer_engine_op_fuser"
    ),
    TransformerEngineOption("--cpu-offloading-num-layers", "cpu_offloading_num_layers", "cpu_offloading"),
    TransformerEngineOption(
        "--fine-grained-activation-offloading",
        "fine_grained_activation_offloading",
        "fine_grained_activation_offloading",
    ),
    TransformerEngineOption("--cache-mla-latents", "cache_mla_latents", "cache_mla_latents"),
)


def add_tiling_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the "tiled linear" group to Megatron's parser; usable as an ``extra_args_provider``."""
    group = parser.add_argument_group(title="tiled linear")
    group.add_argument(
        "--use-tiled-linear",
        "--memory-centric-tiled-linear",
        action="store_true",
        dest="use_tiled_linear",
        help="Compute the model's column- and row-parallel linear layers tile by tile. "
        "(--memory-centric-tiled-linear is Megatron-DeepSpeed's spelling.)",
    )
    group.add_argument(
        "--tile-factor",
        type=int,
        metavar="N",
        help="Tiles per layer: column layers 1xN (output features), row layers Nx1 (input features). "
        f"Default {DEFAULT_FACTOR}.",
    )
    group.add_argument(
        "--tiled-linear-modules",
        nargs="+",
        metavar="MODULE",
        help=f"Which layers to tile, out of {', '.join(MODULES)}. Default: all of them.",
    )
    group.add_argument(
        "--tiled-linear-splits",
        nargs="+",
        metavar="MODULE=INxOUT",
        help="Grids of single modules, in_splits x out_splits, instead of --tile-factor: fc1=1x8 fc2=8x1.",
    )
    group.add_argument(
        "--tiled-linear-fp32-accumulate",
        action="store_true",
        help="Sum over tiles in float32 where activations are bf16 or fp16; costs a float32 copy of what is summed.",
    )
    group.add_argument(
        "--tiled-mlp-keep",
        metavar="N|all",
        help="Tiles of an MLP that keep their pre-activations for the backward pass; the others compute their fc1 "
        "product again. 0 takes the least memory. Default all: nothing but the activation is computed again; 0 where "
        "tiles are partitioned.",
    )
    group.add_argument(
        "--tiled-head-memory-mib",
        type=int,
        metavar="MIB",
        help="Bound for what the loss of a tiled output layer holds at once: one tile of logits, and the input "
        f"gradient in float32. Default {DEFAULT_HEAD_MEMORY_MIB}.",
    )
    group.add_argument(
        "--tiled-head-tokens",
        type=int,
        metavar="N",
        help="Tokens of one tile of logits. Default: chosen from --tiled-head-memory-mib.",
    )
    group.add_argument(
        "--tiled-linear-storage",
        choices=("auto", *STORAGES),
        help="Resident tiles are parts of the stock weight; partitioned ones are parameters of their own, which an "
        "engine (ZeRO-3, FSDP) gathers one by one. Default auto: partitioned where Megatron's flags partition weights.",
    )
    return parser


def validate_tiling_args(args: Namespace) -> TilingConfig | None:
    """Check the flags against each other and against Megatron's.

    Returns:
        The tiling to apply, or ``None`` without ``--use-tiled-linear``.

    Raises:
        ValueError: naming the flag, its value, and what to change.
    """
    if not args.use_tiled_linear:
        for attribute, flag in COMPANIONS.items():
            if getattr(args, attribute) not in (None, False):
                raise ValueError(f"{flag} does nothing without --use-tiled-linear; add that flag or remove this one")
        return None
    _refuse(args, UNSUPPORTED, "--use-tiled-linear")
    _check_sharding(args)
    for option in TRANSFORMER_ENGINE_OPTIONS:
        option.refuse(getattr(args, option.argument, None))
    if getattr(args, "transformer_impl", None) == "transformer_engine" and not find_spec("transformer_engine"):
        raise ValueError(
            "--use-tiled-linear with --transformer-impl transformer_engine: TransformerEngine is not installed; "
            "install it, or use --transformer-impl local"
        )
    config = TilingConfig.from_args(args)
    optimizer = getattr(args, "optimizer", None)
    if config.partitioned and optimizer not in (None, "adam", "sgd"):
        raise ValueError(
            f"--tiled-linear-storage partitioned with --optimizer {optimizer}: it takes each weight as one matrix, "
            "which tiles are not; use adam or sgd, or --tiled-linear-storage resident"
        )
    tokens = micro_batch_tokens(args)
    if config.head_tokens is not None and tokens is not None and config.head_tokens > tokens:
        raise ValueError(
            f"--tiled-head-tokens {config.head_tokens}: a micro-batch has {tokens} tokens on a rank, and no tile can "
            "have more; lower it"
        )
    return config


def _refuse(args: Namespace, unsupported: tuple[tuple[str, tuple[Any, ...], str], ...], beside: str) -> None:
    for attribute, supported, remedy in unsupported:
        value = getattr(args, attribute, None)
        if value not in supported:
            flag = "--" + attribute.replace("_", "-") + ("" if value is True else f" {value}")
            raise ValueError(f"{beside} with {flag}: {remedy}")


def _check_sharding(args: Namespace) -> None:
    if getattr(args, "use_megatron_fsdp", False):
        beside = "--use-tiled-linear --use-megatron-fsdp"
        _refuse(args, UNSUPPORTED_WITH_MEGATRON_FSDP, beside)
        _refuse(args, UNSUPPORTED_WHEN_SHARDED, beside)
    if getattr(args, "use_torch_fsdp2", False):
        beside = "--use-tiled-linear --use-torch-fsdp2"
        if not getattr(args, "torch_fsdp2_reshard_after_forward", True):
            raise ValueError(
                f"{beside} with --torch-fsdp2-no-reshard-after-forward: all tiles would stay gathered; leave it out"
            )
        _refuse(args, UNSUPPORTED_WITH_FSDP2, beside)
        _refuse(args, UNSUPPORTED_WHEN_SHARDED, beside)
        if getattr(args, "num_experts", None):
            _refuse(args, UNSUPPORTED_WITH_FSDP2_AND_EXPERTS, f"{beside} --num-experts {args.num_experts}")


def micro_batch_tokens(args: Namespace) -> int | None:
    """Tokens of one micro-batch on a rank, if the flags say so."""
    sequence, batch = getattr(args, "seq_length", None), getattr(args, "micro_batch_size", None)
    if sequence is None or batch is None:
        return None
    return int(sequence * batch // getattr(args, "context_parallel_size", 1))

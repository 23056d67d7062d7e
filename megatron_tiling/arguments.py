"""The command-line flags, and the one table of what is refused before training starts.

Tiled layers do not work with some of Megatron's settings. Each of these is a row of ``REFUSED``, under what it
concerns. ``refuse`` looks for them in parsed arguments, or in a model's config where there are no arguments.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

from megatron_tiling.config import (
    DEFAULT_FACTOR,
    DEFAULT_HEAD_MEMORY_MIB,
    FLAGS,
    MODULES,
    RESIDENT_MODULES,
    STORAGES,
    TilingConfig,
    argument_of,
)


class Refused(NamedTuple):
    """A setting of Megatron's that is refused.

    Attributes:
        flag: as the command line has it.
        reason: why.
        allowed: values that are fine, or what gives them for parsed arguments or a config.
        remedy: what to do instead.
        names: its attributes of the parsed arguments and of Megatron's model config, where not named as the flag.
    """

    flag: str
    reason: str
    allowed: tuple[Any, ...] | Callable[[Any], tuple[Any, ...]] = (None, False)
    remedy: str = "leave it out"
    names: tuple[str, ...] = ()


#: Flags that can be ``auto``: the planner chooses, of the runner's and ``install``'s commands.
AUTOMATIC = ("--tile-factor", "--tiled-mlp-keep")
_WHOLE_WEIGHT = "a tiled layer needs its weight whole"
_ONE_SIZE = "its buffers are of one size, and tiles are not"
_TWO_ENGINES = "two engines cannot own the same parameters"
_OVERLAPS = "the engine overlaps by itself, see its"
_OFFLOADS = "the engine offloads by itself, see its configuration"
_PAST_MODULES = "it runs parts of a layer past the modules that tiles are sharded by"
OFFLOADING = ("cpu_offloading_num_layers", "cpu_offloading")
_IMPLEMENTATIONS = (None, "local", "transformer_engine")
_PARTITIONED = (None, "auto", "partitioned")
_SHARDED = (
    Refused("--tiled-linear-storage", "only partitioned tiles are sharded", _PARTITIONED),
    Refused("--init-model-with-meta-device", "tiles are cut from weights that exist"),
    Refused("--overlap-moe-expert-parallel-comm", _PAST_MODULES),
)


def _as_many_as(*sizes: str) -> Callable[[Any], tuple[Any, ...]]:
    """The first of these sizes that is set, which Megatron fills in where None is given."""
    return lambda source: (None, next(filter(None, (getattr(source, size, None) for size in sizes)), 1))


def _no_checkpoints(reason: str, or_else: str = "") -> tuple[Refused, ...]:
    remedy = f"leave it out{or_else}"
    return tuple(Refused(f, reason, remedy=remedy) for f in ("--save", "--load", "--pretrained-checkpoint"))


#: All that is refused, by what it concerns.
REFUSED: dict[str, tuple[Refused, ...]] = {
    "runs": (
        Refused(
            "--transformer-impl", "its layers cannot be tiled", _IMPLEMENTATIONS, "use local or transformer_engine"
        ),
    ),
    "tiled layers": (
        Refused("--defer-embedding-wgrad-compute", "a tiled layer computes its weight gradient in its backward pass"),
        Refused("--batch-invariant-mode", "products of tiles are not those that it puts in the place of torch's"),
        Refused("--tensor-parallel-num-weight-shards", _WHOLE_WEIGHT, _as_many_as("tensor_model_parallel_size")),
        Refused(
            "--expert-tensor-parallel-num-weight-shards",
            _WHOLE_WEIGHT,
            _as_many_as("expert_tensor_parallel_size", "tensor_model_parallel_size"),
        ),
    ),
    "partitioned tiles": (
        Refused(
            "--optimizer",
            "it takes a weight as one matrix, tiles are not",
            (None, "adam", "sgd"),
            "use adam or sgd, or resident tiles",
        ),
    ),
    "tiles under Megatron-FSDP": (
        *_SHARDED,
        Refused("--megatron-fsdp-version", "tiles are the units of the first alone", (None, 1), "give 1"),  # from 0.20
        Refused(
            "--data-parallel-sharding-strategy",
            "weights stay whole, and tiles are not sharded",
            ("optim_grads_params",),
            "give optim_grads_params",
        ),
        Refused("--pipeline-model-parallel-size", "Megatron-FSDP makes no device mesh of pipeline stages", (None, 1)),
        Refused("--num-distributed-optimizer-instances", "tiles are sharded over all data-parallel ranks", (None, 1)),
        Refused("--use-nccl-ub", _ONE_SIZE, names=("nccl_ub",)),
        Refused("--fsdp-double-buffer", _ONE_SIZE),
        Refused("--megatron-fsdp-max-pool-double-buffer", _ONE_SIZE),
        *_no_checkpoints("it maps no tiles to and from dense checkpoints", ", or give --use-torch-fsdp2"),
    ),
    "tiles under torch FSDP2": (
        *_SHARDED,
        Refused(
            "--torch-fsdp2-no-reshard-after-forward",
            "all tiles would stay gathered",
            (None, True),
            names=("torch_fsdp2_reshard_after_forward",),
        ),
        Refused(
            "--ckpt-format", "tiles would show in the checkpoint", (None, "torch_dist"), "give --ckpt-format torch_dist"
        ),
    ),
    "experts under torch FSDP2": _no_checkpoints("stock Megatron saves and loads no experts that FSDP2 shards"),
    "ZeRO-3": (
        Refused("--pipeline-model-parallel-size", "the engine runs whole models", (None, 1)),
        Refused("--context-parallel-size", "gradients are averaged over data-parallel ranks only", (None, 1)),
        Refused("--num-experts", "experts have data-parallel groups of their own, the engine is given one"),
        Refused("--mtp-num-layers", "next-token heads share weights across modules"),
        Refused("--use-distributed-optimizer", "ZeRO-3 shards the optimizer itself"),
        Refused("--use-megatron-fsdp", _TWO_ENGINES),
        Refused("--use-torch-fsdp2", _TWO_ENGINES),
        Refused("--tiled-linear-storage", "the engine gathers parameters, and tiles must be some", _PARTITIONED),
        Refused("--overlap-grad-reduce", f"{_OVERLAPS} overlap_comm"),
        Refused("--overlap-param-gather", f"{_OVERLAPS} stage3_prefetch_bucket_size"),
        Refused("--rampup-batch-size", "the engine's batch size is fixed"),
        Refused("--decoupled-lr", "the engine has one learning rate"),
        Refused("--cpu-offloading-num-layers", _OFFLOADS, names=OFFLOADING),
    ),
}


def reasons(source: Any, rows: Iterable[Refused]) -> Iterator[str]:
    """Of parsed arguments or a model's config: what ``rows`` refuse, and what to do instead."""
    return (f"{reason}; {row.remedy}" for row in rows for reason in reasons_of_row(source, row))


def reasons_of_row(source: Any, row: Refused) -> Iterator[str]:
    """What parsed arguments or a model's config ask for of ``row``; an attribute that is not there is fine."""
    allowed = row.allowed(source) if callable(row.allowed) else row.allowed
    for name in row.names or (argument_of(row.flag),):
        value = getattr(source, name, allowed[0])
        if value not in allowed:
            shown = f" {value}" if type(value) in (str, int, float, list) else ""
            yield f"{row.flag}{shown}: {row.reason}"


def refuse(source: Any, rows: Iterable[Refused], beside: str = "--use-tiled-linear") -> None:
    """Refuse parsed arguments or a model's config that ask for one of ``rows``.

    Raises:
        ValueError: naming flag, value, and what to do instead.
    """
    for reason in reasons(source, rows):
        raise ValueError(f"{beside} with {reason}")


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
        type=number_or_text,
        metavar="N|auto",
        help="Tiles per layer: column layers 1xN (output features), row layers Nx1 (input features). "
        f"Default {DEFAULT_FACTOR}; then MLPs and experts that keep all pre-activations have fewer where a tile would "
        "have little work. auto: the planner chooses the fastest that fits.",
    )
    group.add_argument(
        "--tiled-linear-modules",
        action="extend",
        nargs="+",
        metavar="MODULE",
        help=f"Which layers to tile, out of {', '.join(MODULES)}, or all. Default: {', '.join(RESIDENT_MODULES)}, "
        "which save memory; all where tiles are partitioned, and with --tiled-tp-overlap.",
    )
    group.add_argument(
        "--tiled-linear-splits",
        action="extend",
        nargs="+",
        metavar="MODULE=INxOUT",
        help="Grids of single modules, in_splits x out_splits, instead of --tile-factor: fc1=1x8 fc2=8x1. Of grouped "
        "experts the number of tiles: experts=8.",
    )
    group.add_argument(
        "--tiled-linear-fp32-accumulate",
        action="store_true",
        help="Sum over tiles in float32 where activations are bf16 or fp16; costs a float32 copy of what is summed.",
    )
    group.add_argument(
        "--tiled-mlp-keep",
        type=number_or_text,
        metavar="N|all|auto",
        help="Tiles of an MLP, or of a rank's grouped experts, that keep their pre-activations for the backward pass; "
        "the others compute their fc1 product again. 0 takes the least memory. Default all: nothing but the "
        "activation is computed again; 0 where tiles are partitioned. auto: as for --tile-factor.",
    )
    group.add_argument(
        "--tiled-head-memory-mib",
        type=number_or_text,
        metavar="MIB",
        help="Bound for what the loss of a tiled output layer holds at once: tiles of logits, and the input gradient "
        f"in float32. Default {DEFAULT_HEAD_MEMORY_MIB}.",
    )
    group.add_argument(
        "--tiled-head-keep",
        type=number_or_text,
        metavar="N|all",
        help="Tiles of logits that stay from the loss's forward pass for its backward pass, which makes the others "
        "again; within --tiled-head-memory-mib where that is given. Default: what the bound has room for.",
    )
    group.add_argument(
        "--tiled-head-tokens",
        type=number_or_text,
        metavar="N",
        help="Tokens of one tile of logits. Default: chosen from --tiled-head-memory-mib.",
    )
    group.add_argument(
        "--tiled-fp8-hold-weights",
        action="store_true",
        help="MLPs and grouped experts in FP8 keep FP8 copies of their weights over the micro-batches of an optimizer "
        "step, as TransformerEngine's layers do: faster by a twentieth of the MLP's time, for as much memory as bf16 "
        "weights. Without it copies are made for each micro-batch.",
    )
    group.add_argument(
        "--tiled-tp-overlap",
        type=number_or_text,
        metavar="N|auto|off",
        help="MLPs, qkv, proj and the gather before the output layer go by at most N (2 or more) steps of tokens, and "
        "the tensor-parallel communication of a step runs behind the products of others. With auto they do so, by "
        "at most 4 steps, in micro-batches that are large enough for it to pay. An MLP keeps the pre-activations of "
        "all tokens, or none. qkv and proj are tiled too by default. Default off: communication runs before and after "
        "the products.",
    )
    group.add_argument(
        "--tiled-linear-storage",
        metavar=f"{{auto,{','.join(STORAGES)}}}",
        help="Resident tiles are parts of the stock weight; partitioned ones are parameters of their own, which an "
        "engine (ZeRO-3, FSDP) gathers one by one. Default auto: partitioned where Megatron's flags partition weights.",
    )
    return parser


def number_or_text(text: str) -> int | str:
    """Text that is no number goes to ``TilingConfig``, whose refusal is one line, without Megatron's whole usage."""
    try:
        return int(text)
    except ValueError:
        return text


def meant_by(word: str) -> str:
    """Our flag that a word is spelled like, or nothing.

    >>> meant_by("--tiled_splits=fc1=1x8"), meant_by("--tensor-parallel")
    ('--tiled-linear-splits', '')
    """
    flag = word.partition("=")[0].replace("_", "-")
    return next(iter(get_close_matches(flag, ("--use-tiled-linear", *FLAGS.values()), n=1, cutoff=0.75)), "")


def naming_what_was_meant(parser: ArgumentParser) -> ArgumentParser:
    """With an error for flags that it does not know which names those of ours that are spelled alike."""
    changed: Any = parser
    stock = parser.error

    def error(message: str) -> NoReturn:
        what, _, unknown = message.partition("unrecognized arguments: ")
        for word in [] if what else unknown.split():
            near = meant_by(word)
            message += f"; is {word} {near}?" if near else ""
        stock(message)

    changed.error = error
    return parser


def validate_tiling_args(args: Namespace) -> TilingConfig | None:
    """Check the flags against each other and against Megatron's.

    Returns:
        The tiling to apply, or ``None`` without ``--use-tiled-linear``.

    Raises:
        ValueError: naming the flag, its value, and what to change.
    """
    if not getattr(args, "use_tiled_linear", False):
        for flag in FLAGS.values():
            value = getattr(args, argument_of(flag), None)
            if value is not None and value is not False:  # 0 is given
                raise ValueError(f"{flag} does nothing without --use-tiled-linear; add that flag or remove this one")
        return None
    for concern in ("runs", "tiled layers"):
        refuse(args, REFUSED[concern])
    if getattr(args, "use_megatron_fsdp", False):
        refuse(args, REFUSED["tiles under Megatron-FSDP"], "--use-tiled-linear --use-megatron-fsdp")
    if getattr(args, "use_torch_fsdp2", False):
        beside = "--use-tiled-linear --use-torch-fsdp2"
        refuse(args, REFUSED["tiles under torch FSDP2"], beside)
        if getattr(args, "num_experts", None):
            refuse(args, REFUSED["experts under torch FSDP2"], f"{beside} --num-experts {args.num_experts}")
    if getattr(args, "transformer_impl", None) == "transformer_engine" and not find_spec("transformer_engine"):
        raise ValueError(
            "--use-tiled-linear with --transformer-impl transformer_engine: TransformerEngine is not installed; "
            "install it, or use --transformer-impl local --no-persist-layer-norm --no-rope-fusion "
            "--no-masked-softmax-fusion"
        )
    config = TilingConfig.from_args(args)
    if config.partitioned:
        refuse(args, REFUSED["partitioned tiles"], "--tiled-linear-storage partitioned")
    if config.fp8_hold_weights and not getattr(args, "fp8", None):
        raise ValueError("--tiled-fp8-hold-weights does nothing without --fp8-format; add that flag or remove this one")
    if config.fp8_hold_weights and getattr(args, "disable_parameter_transpose_cache", False):
        raise ValueError("--tiled-fp8-hold-weights with --disable-parameter-transpose-cache: leave one of them out")
    sequence, batch = getattr(args, "seq_length", None), getattr(args, "micro_batch_size", None)
    if config.head_tokens is not None and sequence and batch:
        tokens = sequence * batch // getattr(args, "context_parallel_size", 1)
        if config.head_tokens > tokens:
            raise ValueError(
                f"--tiled-head-tokens {config.head_tokens}: a micro-batch has {tokens} tokens on a rank, and no tile "
                "can have more; lower it"
            )
    return config

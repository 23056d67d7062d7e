"""What to tile, and how finely: pure data, built from parsed arguments or by hand."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

COLUMN_MODULES = ("qkv", "fc1", "output")
ROW_MODULES = ("proj", "fc2")
MODULES = ("qkv", "proj", "fc1", "fc2", "output")
DEFAULT_FACTOR = 4
DEFAULT_HEAD_MEMORY_MIB = 272
#: Attribute name of a layer in its parent module -> the module name that flags use.
MODULE_OF_ATTRIBUTE = {
    "linear_qkv": "qkv",
    "linear_q": "qkv",
    "linear_kv": "qkv",
    "linear_q_proj": "qkv",
    "linear_q_up_proj": "qkv",
    "linear_kv_up_proj": "qkv",
    "linear_proj": "proj",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
    "output_layer": "output",
}
#: Multi-latent attention asks whether these are stock layers, by exact class.
MLA_DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj", "linear_qkv_down_proj")
Storage = Literal["resident", "partitioned"]
STORAGES: tuple[Storage, ...] = get_args(Storage)


def parse_splits(settings: Iterable[str]) -> dict[str, tuple[int, int]]:
    """``["fc1=1x8"]`` -> ``{"fc1": (1, 8)}``, in_splits first.

    Raises:
        ValueError: a setting is malformed, names an unknown module, or names one twice.
    """
    splits: dict[str, tuple[int, int]] = {}
    for setting in settings:
        module, _, grid = setting.partition("=")
        parts = grid.split("x")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(
                f"--tiled-linear-splits {setting}: write MODULE=INxOUT with two whole numbers, as in fc1=1x8"
            )
        if module not in MODULES:
            raise ValueError(
                f"--tiled-linear-splits {setting}: unknown module '{module}', choose from {', '.join(MODULES)}"
            )
        if module in splits:
            raise ValueError(f"--tiled-linear-splits {setting}: {module} is given twice")
        splits[module] = (int(parts[0]), int(parts[1]))
    return splits


def parse_keep(keep: str | None) -> int | Literal["all"] | None:
    """``"all"``, ``"2"`` -> 2, or ``None``.

    Raises:
        ValueError: anything else.
    """
    if keep is None or keep == "all":
        return keep  # type: ignore[return-value]
    if not (keep.isascii() and keep.isdigit()):
        raise ValueError(f"--tiled-mlp-keep {keep}: write a number of tiles, or all")
    return int(keep)


def storage_of(args: Namespace) -> Storage:
    """Where tiles live: as ``--tiled-linear-storage`` says, or partitioned where Megatron's flags partition weights."""
    chosen: str | None = args.tiled_linear_storage
    if chosen in STORAGES:
        return chosen
    megatron_fsdp = getattr(args, "use_megatron_fsdp", False)
    shards_weights = getattr(args, "data_parallel_sharding_strategy", None) == "optim_grads_params"
    torch_fsdp2 = getattr(args, "use_torch_fsdp2", False)
    return "partitioned" if torch_fsdp2 or (megatron_fsdp and shards_weights) else "resident"


@dataclass(frozen=True)
class TilingConfig:
    """Which layers become tiled, and their grids.

    Args:
        factor: tiles of a layer along its natural dimension, ``1 x factor`` for column layers (qkv, fc1, output)
            and ``factor x 1`` for row layers (proj, fc2).
        modules: the layers to tile, out of ``MODULES``.
        splits: ``{module: (in_splits, out_splits)}`` for modules that do not follow ``factor``.
        fuse_wgrad: add weight gradients straight into ``main_grad`` (Megatron's gradient accumulation fusion,
            without apex). ``None`` follows the built layers' own setting.
        fp32_accumulate: sum over tiles in float32 where activations are narrower.
        mlp_keep: tiles of an MLP that keep their pre-activations for the backward pass, the others recompute their
            fc1 product; ``"all"``. ``None`` keeps all of them where weights are resident, none where partitioned.
        head_memory_mib: bound for what the LM head's loss holds at once: a tile of logits and the float32 sum of the
            input gradient.
        head_tokens: tokens of one tile of logits; ``None`` lets the bound choose.
        storage: ``"partitioned"`` makes each tile a parameter of its own, for an engine (ZeRO-3, FSDP) that gathers
            it around its use.

    Raises:
        ValueError: on any value out of range, naming the flag to change.
    """

    factor: int = DEFAULT_FACTOR
    modules: tuple[str, ...] = MODULES
    splits: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    fuse_wgrad: bool | None = None
    fp32_accumulate: bool = False
    mlp_keep: int | Literal["all"] | None = None
    head_memory_mib: int = DEFAULT_HEAD_MEMORY_MIB
    head_tokens: int | None = None
    storage: Storage = "resident"

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--tile-factor", self.factor, 1),
            ("--tiled-mlp-keep", self.mlp_keep, 0),
            ("--tiled-head-memory-mib", self.head_memory_mib, 1),
            ("--tiled-head-tokens", self.head_tokens, 1),
        ):
            if isinstance(value, int) and value < least:
                raise ValueError(f"{flag} {value}: must be at least {least}")
        unknown = [module for module in self.modules if module not in MODULES]
        if unknown or not self.modules:
            raise ValueError(
                f"--tiled-linear-modules {' '.join(unknown) or '(none)'}: choose from {', '.join(MODULES)}"
            )
        for module, (in_splits, out_splits) in self.splits.items():
            if module not in self.modules:
                raise ValueError(
                    f"--tiled-linear-splits {module}={in_splits}x{out_splits}: {module} is not among the modules "
                    f"to tile ({', '.join(self.modules)}); add it to --tiled-linear-modules"
                )
            if in_splits < 1 or out_splits < 1:
                raise ValueError(
                    f"--tiled-linear-splits {module}={in_splits}x{out_splits}: both numbers must be at least 1"
                )
        if self.storage not in STORAGES:
            raise ValueError(f"--tiled-linear-storage {self.storage}: choose from auto, {', '.join(STORAGES)}")
        if self.partitioned:
            self._refuse_with_partitioned()

    def _refuse_with_partitioned(self) -> None:
        for flag, given, reason in (
            ("fuse_wgrad=True", self.fuse_wgrad is True, "the engine owns the gradients of partitioned tiles"),
            ("--tiled-linear-fp32-accumulate", self.fp32_accumulate, "autograd sums over partitioned tiles"),
            ("--tiled-head-tokens", self.head_tokens is not None, "a partitioned output layer makes whole logits"),
            (
                "--tiled-head-memory-mib",
                self.head_memory_mib != DEFAULT_HEAD_MEMORY_MIB,
                "a partitioned output layer makes whole logits",
            ),
        ):
            if given:
                raise ValueError(f"{flag}: {reason}; leave it out, or give --tiled-linear-storage resident")

    @property
    def partitioned(self) -> bool:
        return self.storage == "partitioned"

    @property
    def kept_tiles(self) -> int | None:
        """``mlp_keep`` as a number; ``None`` is all of them."""
        if self.mlp_keep is None:
            return 0 if self.partitioned else None
        return None if self.mlp_keep == "all" else self.mlp_keep

    @classmethod
    def from_args(cls, args: Namespace, **overrides: Any) -> Self:
        """From the namespace that Megatron's parser returns, with the flags of ``arguments.py`` in it."""
        settings: dict[str, Any] = {
            "factor": DEFAULT_FACTOR if args.tile_factor is None else args.tile_factor,
            "modules": tuple(MODULES if args.tiled_linear_modules is None else args.tiled_linear_modules),
            "splits": parse_splits(args.tiled_linear_splits or ()),
            "fp32_accumulate": bool(args.tiled_linear_fp32_accumulate),
            "mlp_keep": parse_keep(args.tiled_mlp_keep),
            "head_memory_mib": (
                DEFAULT_HEAD_MEMORY_MIB if args.tiled_head_memory_mib is None else args.tiled_head_memory_mib
            ),
            "head_tokens": args.tiled_head_tokens,
            "storage": storage_of(args),
        }
        return cls(**(settings | overrides))

    def splits_of(self, module: str) -> tuple[int, int]:
        """``(in_splits, out_splits)`` of a module."""
        if module in self.splits:
            return self.splits[module]
        return (self.factor, 1) if module in ROW_MODULES else (1, self.factor)

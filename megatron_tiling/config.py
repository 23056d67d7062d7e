"""What to tile, and how finely: pure data, built from parsed arguments or by hand."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

COLUMN_MODULES = ("qkv", "fc1", "output")
ROW_MODULES = ("proj", "fc2")
MODULES = ("qkv", "proj", "fc1", "fc2", "output")
DEFAULT_FACTOR = 4
DEFAULT_HEAD_MEMORY_MIB = 272


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


def parse_keep(keep: str | None) -> int | None:
    """``"all"`` -> ``None``, ``"2"`` -> 2.

    Raises:
        ValueError: anything else.
    """
    if keep is None or keep == "all":
        return None
    if not (keep.isascii() and keep.isdigit()):
        raise ValueError(f"--tiled-mlp-keep {keep}: write a number of tiles, or all")
    return int(keep)


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
            fc1 product; ``None`` is all of them.
        head_memory_mib: bound for what the LM head's loss holds at once: a tile of logits and the float32 sum of the
            input gradient.
        head_tokens: tokens of one tile of logits; ``None`` lets the bound choose.

    Raises:
        ValueError: on any value out of range, naming the flag to change.
    """

    factor: int = DEFAULT_FACTOR
    modules: tuple[str, ...] = MODULES
    splits: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    fuse_wgrad: bool | None = None
    fp32_accumulate: bool = False
    mlp_keep: int | None = None
    head_memory_mib: int = DEFAULT_HEAD_MEMORY_MIB
    head_tokens: int | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--tile-factor", self.factor, 1),
            ("--tiled-mlp-keep", self.mlp_keep, 0),
            ("--tiled-head-memory-mib", self.head_memory_mib, 1),
            ("--tiled-head-tokens", self.head_tokens, 1),
        ):
            if value is not None and value < least:
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
        }
        return cls(**(settings | overrides))

    def splits_of(self, module: str) -> tuple[int, int]:
        """``(in_splits, out_splits)`` of a module."""
        if module in self.splits:
            return self.splits[module]
        return (self.factor, 1) if module in ROW_MODULES else (1, self.factor)

"""What to tile, and how finely: pure data, built from parsed arguments or by hand."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, NoReturn, Self, get_args

ROW_MODULES = ("proj", "fc2")
MODULES = ("qkv", "proj", "fc1", "fc2", "experts", "output")
#: By default, of resident tiles: those that save memory.
RESIDENT_MODULES = ("fc1", "fc2", "experts", "output")
#: Attention's: their tiles gain nothing, but their communication can run behind their products.
ATTENTION_MODULES = ("qkv", "proj")
#: Layers outside an MLP whose communication can run behind their products.
OVERLAPPED_MODULES = (*ATTENTION_MODULES, "output")
DEFAULT_FACTOR = 4
AUTO_STEPS = 4  # of --tiled-tp-overlap auto
DEFAULT_HEAD_MEMORY_MIB = 600
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
#: Of the environment, where trainers have no place for flags: see ``integrations/settings.py``.
VARIABLE = "MEGATRON_TILING"
Storage = Literal["resident", "partitioned"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
#: Fields of TilingConfig -> the flags that set them.
FLAGS = {
    "factor": "--tile-factor",
    "modules": "--tiled-linear-modules",
    "splits": "--tiled-linear-splits",
    "fp32_accumulate": "--tiled-linear-fp32-accumulate",
    "mlp_keep": "--tiled-mlp-keep",
    "head_memory_mib": "--tiled-head-memory-mib",
    "head_keep": "--tiled-head-keep",
    "head_tokens": "--tiled-head-tokens",
    "storage": "--tiled-linear-storage",
    "fp8_hold_weights": "--tiled-fp8-hold-weights",
    "tp_overlap": "--tiled-tp-overlap",
}
#: Why a layer that could be tiled is dense, in the table.
NOT_ASKED_FOR = f"not in {FLAGS['modules']}"


def words_of(values: str | Iterable[str]) -> list[str]:
    """The words of a flag's value, or of its values, with blanks or commas between them.

    >>> words_of(["fc1,fc2", "output"])
    ['fc1', 'fc2', 'output']
    """
    values = [values] if isinstance(values, str) else values
    return [word for value in values for word in value.replace(",", " ").split() or [value]]


def parse_splits(settings: str | Iterable[str]) -> dict[str, tuple[int, int]]:
    """``["fc1=1x8", "experts=4"]`` -> ``{"fc1": (1, 8), "experts": (1, 4)}``, in_splits first.

    Raises:
        ValueError: a setting is malformed, names an unknown module, or names one twice.
    """
    splits: dict[str, tuple[int, int]] = {}
    for setting in words_of(settings):
        module, _, grid = setting.partition("=")
        parts = ["1", grid] if module == "experts" else grid.split("x")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise ValueError(
                f"--tiled-linear-splits {setting}: write MODULE=INxOUT, both whole numbers of at least 1, as in "
                "fc1=1x8, or experts=N"
            )
        if module not in MODULES:
            raise ValueError(
                f"--tiled-linear-splits {setting}: unknown module '{module}', choose from {', '.join(MODULES)}"
            )
        if module in splits:
            raise ValueError(f"--tiled-linear-splits {setting}: {module} is given twice")
        splits[module] = (int(parts[0]), int(parts[1]))
    return splits


def argument_of(flag: str) -> str:
    """``"--tile-factor"`` -> ``"tile_factor"``, its attribute of the parsed arguments."""
    return flag.removeprefix("--").replace("-", "_")


def storage_of(args: Namespace) -> Storage:
    """Where tiles live: as ``--tiled-linear-storage`` says, or partitioned where Megatron's flags partition weights."""
    chosen: Any = getattr(args, "tiled_linear_storage", None)
    if chosen not in (None, "auto"):
        return chosen  # TilingConfig refuses what is no storage
    megatron_fsdp = getattr(args, "use_megatron_fsdp", False)
    shards_weights = getattr(args, "data_parallel_sharding_strategy", None) == "optim_grads_params"
    torch_fsdp2 = getattr(args, "use_torch_fsdp2", False)
    return "partitioned" if torch_fsdp2 or (megatron_fsdp and shards_weights) else "resident"


class _ReadOnlyDict(dict[str, tuple[int, int]]):
    """Unlike ``MappingProxyType`` it can be hashed, pickled and copied, as the config that holds it."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("the splits of a TilingConfig are read-only; dataclasses.replace makes another config")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


_WHOLE = "a whole number of at least"
_AUTO = "; the flag can be auto, where Megatron's own trainer builds the model"


def _is_whole(value: Any, least: int, or_none: bool = False) -> bool:
    if value is None:
        return or_none
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _is_number_to_keep(value: Any) -> bool:
    return value in (None, "all") or _is_whole(value, 0)


def _are_modules(value: Any) -> bool:
    named = isinstance(value, tuple) and all(module in MODULES for module in value)
    return value in (None, "all") or (named and 0 < len(set(value)) == len(value))


def _are_grids(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(grid, (tuple, list)) and len(grid) == 2 and all(_is_whole(number, 1) for number in grid)
        for grid in value.values()
    )


@dataclass(frozen=True)
class TilingConfig:
    """Which layers become tiled, and their grids.

    Args:
        factor: tiles of a layer along its natural dimension, ``1 x factor`` for column layers (qkv, fc1, output)
            and ``factor x 1`` for row layers (proj, fc2). ``None`` is ``DEFAULT_FACTOR``, and at most that for MLPs and
            grouped experts that keep all pre-activations: where a tile would have little work, there are fewer.
        modules: the layers to tile, out of ``MODULES``, or ``"all"``; experts are those in grouped GEMMs. ``None``
            tiles what gains: fc1, fc2, experts and output where tiles are resident, all where they are partitioned or
            with ``tp_overlap``.
        splits: ``{module: (in_splits, out_splits)}`` for modules that do not follow ``factor``; ``{"experts": (1, N)}``
            are N tiles of a rank's grouped experts. With ``tp_overlap`` qkv and proj are one tile by default.
        fuse_wgrad: add weight gradients straight into ``main_grad`` (Megatron's gradient accumulation fusion,
            without apex). ``None`` follows the built layers' own setting.
        fp32_accumulate: sum over tiles in float32 where activations are narrower.
        mlp_keep: tiles of an MLP, or of grouped experts, that keep their pre-activations for the backward pass, the
            others recompute their fc1 product; ``"all"``. ``None`` keeps all of them where weights are resident, none
            where partitioned.
        head_memory_mib: bound for what the LM head's loss holds at once: tiles of logits and the input gradient.
            ``None`` is the default, ``DEFAULT_HEAD_MEMORY_MIB``.
        head_tokens: tokens of one tile of logits; ``None`` lets the bound choose.
        storage: ``"partitioned"`` makes each tile a parameter of its own, for an engine (ZeRO-3, FSDP) that gathers
            it around its use.
        head_keep: tiles of logits that stay from the forward to the backward pass, which makes the others again;
            ``"all"``. Within ``head_memory_mib`` where that is given; ``None`` keeps what the bound has room for.
        fp8_hold_weights: MLPs and grouped experts in FP8 keep FP8 copies of their weights over the micro-batches of an
            optimizer step, as TransformerEngine's layers do, and do not make them again for each.
        tp_overlap: MLPs, qkv and proj whose tensor-parallel communication runs behind their products go by at most so
            many steps of tokens, in place of tiles of features, and so does the output layer's first tile. ``"auto"``:
            ``AUTO_STEPS``, where there are so many tokens that it pays. ``None`` or ``"off"``: it runs before and after
            the products.

    Hashable, and can be pickled and copied: lists become tuples, ``splits`` a read-only dict.

    Raises:
        ValueError: a value of another type or out of range, or one without effect, naming the flag to change.
    """

    factor: int | None = None
    modules: tuple[str, ...] | Literal["all"] | None = None
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fuse_wgrad: bool | None = None
    fp32_accumulate: bool = False
    mlp_keep: int | Literal["all"] | None = None
    head_memory_mib: int | None = None
    head_tokens: int | None = None
    storage: Storage = "resident"
    head_keep: int | Literal["all"] | None = None
    fp8_hold_weights: bool = False
    tp_overlap: int | Literal["auto", "off"] | None = None

    def __post_init__(self) -> None:
        modules: Any = self.modules
        if isinstance(modules, (tuple, list)):
            object.__setattr__(self, "modules", "all" if [*modules] == ["all"] else tuple(modules))
        for name, fine, wanted in (
            ("factor", _is_whole(self.factor, 1, True), f"{_WHOLE} 1{_AUTO}"),
            ("modules", _are_modules(self.modules), f"some of {', '.join(MODULES)}, each once, or all"),
            ("splits", _are_grids(self.splits), "{module: (in_splits, out_splits)}, whole numbers of at least 1"),
            ("fuse_wgrad", isinstance(self.fuse_wgrad, bool | None), "True, False or None"),
            ("fp32_accumulate", isinstance(self.fp32_accumulate, bool), "True or False"),
            ("mlp_keep", _is_number_to_keep(self.mlp_keep), f"{_WHOLE} 0, or all{_AUTO}"),
            ("head_memory_mib", _is_whole(self.head_memory_mib, 1, True), f"{_WHOLE} 1"),
            ("head_keep", _is_number_to_keep(self.head_keep), f"{_WHOLE} 0, or all"),
            ("head_tokens", _is_whole(self.head_tokens, 1, True), f"{_WHOLE} 1"),
            ("storage", self.storage in STORAGES, f"{' or '.join(STORAGES)}; the flag alone can also be auto"),
            ("fp8_hold_weights", isinstance(self.fp8_hold_weights, bool), "True or False"),
            (
                "tp_overlap",
                self.tp_overlap in (None, "auto", "off") or _is_whole(self.tp_overlap, 2),
                f"{_WHOLE} 2, auto, or off",
            ),
        ):
            value = getattr(self, name)
            if not fine:
                shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else repr(value)
                raise ValueError(f"{FLAGS.get(name, name)} {shown}: must be {wanted}")
            if _is_whole(value, 0):
                object.__setattr__(self, name, int(value))  # NumPy's too
        grids = {module: (int(in_splits), int(out_splits)) for module, (in_splits, out_splits) in self.splits.items()}
        object.__setattr__(self, "splits", _ReadOnlyDict(grids))
        for module in self.splits:
            if module not in self.tiled_modules:
                raise ValueError(
                    f"--tiled-linear-splits {self.setting_of(module)}: {module} is not among the modules "
                    f"to tile ({', '.join(self.tiled_modules)}); add it to --tiled-linear-modules"
                )
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        experts = self.splits.get("experts", (1, 1))
        if experts[0] != 1:
            raise ValueError(f"--tiled-linear-splits experts={experts}: experts have one number of tiles, (1, N)")

        def of_partitioned(reason: str) -> str:
            return f"{reason}; leave it out, or give --tiled-linear-storage resident" if self.partitioned else ""

        engine = of_partitioned("autograd and the engine sum what partitioned tiles give")
        no_experts = of_partitioned("partitioned tiles are not of grouped experts")
        once = of_partitioned("partitioned tiles communicate once around a layer")
        not_in_fp8 = of_partitioned("partitioned tiles are not in FP8")
        untiled_mlp = not {"fc1", "fc2"} <= set(self.tiled_modules) and "fc1 and fc2 are not both tiled; leave it out"
        others = set(OVERLAPPED_MODULES) & set(self.tiled_modules)
        nothing_to_overlap = not others and untiled_mlp and f"qkv, proj and output are not tiled, and {untiled_mlp}"
        untiled = "experts" not in self.tiled_modules and untiled_mlp
        head = "output" not in self.tiled_modules and "the output layer is not tiled; leave it out"
        head = head or of_partitioned("a partitioned output layer makes whole logits")
        overlap = self.overlap_steps
        fixed = self.head_tokens is not None and "output" in self.splits and self.head_keep in (0, 1)
        whatever_the_bound = fixed and (
            f"{FLAGS['head_tokens']}, {FLAGS['splits']} output=... and {FLAGS['head_keep']} {self.head_keep} leave it "
            "nothing to choose; leave out one of them"
        )
        for setting, given, reason in (
            ("fuse_wgrad=True", self.fuse_wgrad, engine),
            (FLAGS["fp32_accumulate"], self.fp32_accumulate, engine),
            (FLAGS["mlp_keep"], self.mlp_keep is not None, untiled),
            (f"{FLAGS['splits']} experts={experts[1]}", "experts" in self.splits, no_experts),
            (FLAGS["fp8_hold_weights"], self.fp8_hold_weights, not_in_fp8 or untiled),
            (f"{FLAGS['tp_overlap']} {self.tp_overlap}", overlap, once or nothing_to_overlap),
            (
                f"{FLAGS['mlp_keep']} {self.mlp_keep} with {FLAGS['tp_overlap']} {self.tp_overlap}",
                overlap and self.mlp_keep not in (None, 0, "all"),
                not untiled_mlp and "an MLP that goes by steps of tokens keeps all or none; give all or 0",
            ),
            (FLAGS["head_tokens"], self.head_tokens is not None, head),
            (FLAGS["head_memory_mib"], self.head_memory_mib is not None, head or whatever_the_bound),
            (FLAGS["head_keep"], self.head_keep is not None, head),
        ):
            if given and reason:
                raise ValueError(f"{setting}: {reason}")

    @property
    def partitioned(self) -> bool:
        return self.storage == "partitioned"

    @property
    def tiled_modules(self) -> tuple[str, ...]:
        """Those that ``modules`` means."""
        if self.modules is None:
            return MODULES if self.partitioned or self.overlap_steps else RESIDENT_MODULES
        return MODULES if self.modules == "all" else self.modules

    @property
    def overlap_steps(self) -> int | None:
        """``tp_overlap`` as a number; ``None`` is off."""
        if self.tp_overlap == "auto":
            return AUTO_STEPS
        return None if self.tp_overlap == "off" else self.tp_overlap

    @property
    def kept_tiles(self) -> int | None:
        """``mlp_keep`` as a number; ``None`` is all of them."""
        if self.mlp_keep is None:
            return 0 if self.partitioned else None
        return None if self.mlp_keep == "all" else self.mlp_keep

    @classmethod
    def from_args(cls, args: Namespace, **overrides: Any) -> Self:
        """From the namespace that Megatron's parser returns, with the flags of ``arguments.py`` in it."""
        given = {name: getattr(args, argument_of(flag), None) for name, flag in FLAGS.items()}
        settings = {name: value for name, value in given.items() if value is not None}
        if modules := given["modules"]:
            settings["modules"] = words_of(modules)
        settings |= {"splits": parse_splits(given["splits"] or ()), "storage": storage_of(args)}
        return cls(**(settings | overrides))

    def splits_of(self, module: str) -> tuple[int, int]:
        """``(in_splits, out_splits)`` of a module."""
        if module in self.splits:
            return self.splits[module]
        if self.overlap_steps and module in ATTENTION_MODULES:
            return 1, 1
        factor = self.factor or DEFAULT_FACTOR
        return (factor, 1) if module in ROW_MODULES else (1, factor)

    def fewer_if_small(self, module: str) -> bool:
        """Whether the tiles of a module are a number at most, which was not given."""
        return self.factor is None and self.kept_tiles is None and not self.partitioned and module not in self.splits

    def setting_of(self, module: str) -> str:
        """``fc1=1x8`` or ``experts=4``, as ``--tiled-linear-splits`` takes it."""
        in_splits, out_splits = self.splits_of(module)
        return f"{module}={out_splits}" if module == "experts" else f"{module}={in_splits}x{out_splits}"

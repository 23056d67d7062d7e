"""Convert checkpoints between DeepSpeed's tile keys and dense Megatron keys.

    python -m megatron_tiling.convert_deepspeed to-dense SOURCE TARGET
    python -m megatron_tiling.convert_deepspeed to-tiled SOURCE TARGET --tiled-linear-splits fc1=1x4 fc2=4x1

``to-dense`` writes what stock Megatron loads as ``--ckpt-format torch``; ``to-tiled`` writes what DeepSpeed's engine
saves. Either takes both layouts:

    SOURCE/global_step100/mp_rank_00_model_states.pt    DeepSpeed, also Megatron-DeepSpeed
    SOURCE/iter_0000100/mp_rank_00/model_optim_rng.pt   Megatron

One file is one tensor-parallel rank, and the ranks stay as many. Weights, arguments and the iteration are converted;
optimizer and random states are not.
"""

import argparse
import pickle
import re
import sys
import tempfile
import types
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiling import deepspeed_names
from megatron_tiling.config import parse_splits
from megatron_tiling.tiles import deepspeed_keys

DEEPSPEED_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
MEGATRON_FOLDER = re.compile(r"mp_rank_(\d+)")
#: File names that mean a layout which is not converted, and what to do about it.
REFUSED = {
    r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt": "its weights are partitioned by ZeRO-3: load it in DeepSpeed, "
    "and save it again with ZeRO stage 0",
    r"layer_\d+-model_.*\.pt": "it is of DeepSpeed's pipeline module, which has no tiled layers",
    r".*expert_\d+_mp_rank_\d+_model_states\.pt": "DeepSpeed's experts have no layer to go to",
    r"mp_rank_\d+_\d+.*": "it is pipeline or expert parallel: save it with one pipeline stage",
    r"metadata\.json|\.metadata": "it is a distributed checkpoint: save it with --ckpt-convert-format torch",
}
MEGATRON_TRACKER, DEEPSPEED_TRACKER = "latest_checkpointed_iteration.txt", "latest"


class Refused(ValueError):
    """A checkpoint that is not converted; the message names the file or folder, and says why. Nothing was written."""


@dataclass(frozen=True)
class Rank:
    """What is converted of one rank's file.

    Attributes:
        state: flat state dict, with the names that it was saved with.
        version: Megatron's ``checkpoint_version``, which tells the order of query, key and value rows.
        args: Megatron's arguments, those of plain types; ``None`` if the file has none.
        iteration: at which it was saved.
        world: the tensor-parallel ranks that saved it, as DeepSpeed says.
    """

    state: deepspeed_keys.State
    version: float
    args: Namespace | None
    iteration: int
    world: int | None

    def layout(self) -> dict[str, str]:
        """What must be the same on every rank."""
        entries = {key: f"{list(value.shape)} of {value.dtype}" for key, value in self.state.items()}
        return {"iteration": str(self.iteration), "checkpoint_version": str(self.version)} | entries


def find_ranks(source: Path) -> list[Path]:
    """The files of a checkpoint, in the order of ranks.

    Args:
        source: a folder of checkpoints, whose latest is taken, or the folder of one checkpoint.

    Raises:
        Refused: there is no checkpoint, one of another layout, or one with a rank missing or there twice.
    """
    folder = _latest(source)
    ranks: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, path.name):
                raise Refused(f"{path}: {reason}")
        file = path / "model_optim_rng.pt" if MEGATRON_FOLDER.fullmatch(path.name) else path
        if match := MEGATRON_FOLDER.fullmatch(path.name) or DEEPSPEED_FILE.fullmatch(path.name):
            if other := ranks.get(int(match[1])):
                raise Refused(f"{other} and {file} are of the same rank: keep one of them")
            ranks[int(match[1])] = file
    if not ranks:
        raise Refused(f"{folder} holds neither mp_rank_00_model_states.pt nor mp_rank_00/model_optim_rng.pt")
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        raise Refused(f"{folder}: the file of mp_rank_{missing[0]:02d} is missing")
    return [ranks[rank] for rank in sorted(ranks)]


def _latest(source: Path) -> Path:
    if not source.is_dir():
        raise Refused(f"there is no folder {source}")
    named: dict[Path, Path] = {}
    for tracker in (source / DEEPSPEED_TRACKER, source / MEGATRON_TRACKER):
        if tracker.is_file():
            name = tracker.read_text().strip()
            folders = [source / f"iter_{int(name):07d}", source / f"global_step{name}"] if name.isdigit() else []
            found = next((folder for folder in [source / name, *folders] if folder.is_dir()), None)
            if found is None:
                raise Refused(f"{tracker} names {name}, and there is no such checkpoint in {source}")
            named[found] = tracker
    if len(named) > 1:
        raise Refused(" and ".join(f"{tracker} names {found.name}" for found, tracker in named.items()) + ": give one")
    return next(iter(named), source)


class _Unknown:
    """Stands for an object of a class that is not installed: an old trainer's arguments may hold such objects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return _Unknown


_TOLERANT: Any = types.ModuleType("tolerant_pickle")
_TOLERANT.Unpickler, _TOLERANT.load = _Unpickler, lambda file, **kwargs: _Unpickler(file, **kwargs).load()


def read(path: Path) -> Rank:
    """One rank's file. It is unpickled, which can run code: convert only files that you trust.

    Raises:
        Refused: the file is missing, cannot be read, or holds no model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TOLERANT)
    except FileNotFoundError:
        raise Refused(f"{path} is missing") from None
    except Exception as error:  # a zip or a pickle that is cut off fails in many ways
        first_line = (str(error).splitlines() or [""])[0]
        raise Refused(f"{path} cannot be read, is it whole? {type(error).__name__}: {first_line}") from None
    models = [content[key] for key in ("module", "model") if key in content] if isinstance(content, Mapping) else []
    model = models[0] if models else None
    if not isinstance(model, Mapping):
        raise Refused(f"{path} holds no 'module' (DeepSpeed) or 'model' (Megatron)")
    try:
        state = deepspeed_keys.flatten(model)
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
    iteration = next((content[key] for key in ("iteration", "global_steps") if content.get(key) is not None), 0)
    if not isinstance(iteration, int) or iteration < 0:
        raise Refused(f"{path}: its iteration is {iteration!r}, not a number of steps")
    args = content.get("args")
    version = 3.0 if deepspeed_names.uses_core_names(state) else content.get("checkpoint_version", 0)
    return Rank(
        state,
        version,
        None if args is None else Namespace(**dict(_plain(vars(args)))),
        iteration,
        content.get("mp_world_size"),
    )


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What Megatron can load again, wherever it was saved."""
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if all(item is None or type(item) in (bool, int, float, str) for item in items):
            yield name, value


def dense_rank(rank: Rank, ranks: int) -> dict[str, Any]:
    """What stock Megatron loads of a tile-keyed rank, as one of ``ranks``."""
    state = _dense_state(deepspeed_keys.join_tiles(rank.state), rank, ranks)
    dense = {"model": state, "checkpoint_version": 3.0, "iteration": rank.iteration}
    return dense if rank.args is None else dense | {"args": _core_args(rank.args, ranks)}


def _dense_state(state: deepspeed_keys.State, rank: Rank, ranks: int) -> deepspeed_keys.State:
    """Under megatron-core's names, in today's order of rows, and known to fit together."""
    state = deepspeed_names.core_names(state)
    heads = getattr(rank.args, "num_attention_heads", None)
    deepspeed_names.check_model(state, _sizes(rank.args, ranks), getattr(rank.args, "num_layers", None))
    return deepspeed_names.reorder_qkv(state, rank.version, heads and heads // ranks)


def _sizes(args: Namespace | None, ranks: int) -> dict[str, tuple[int | None, int | None]]:
    """Shapes of a rank's weights within a layer, as far as Megatron's arguments tell."""
    known = {} if args is None else vars(args)
    hidden, ffn, heads = (known.get(name) for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads"))
    sizes = {}
    if ffn:
        sizes["mlp.linear_fc2.weight"] = (hidden, ffn // ranks)
    if ffn and known.get("swiglu"):
        sizes["mlp.linear_fc1.weight"] = (2 * ffn // ranks, hidden)
    if heads and hidden and not known.get("attention_output_gate"):
        size = known.get("kv_channels") or hidden // heads
        grouped = known.get("num_query_groups") if known.get("group_query_attention") else None
        groups = grouped or known.get("num_key_value_heads") or heads
        sizes["self_attention.linear_proj.weight"] = (hidden, heads * size // ranks)
        if groups % ranks == 0:  # else ranks share a group
            sizes["self_attention.linear_qkv.weight"] = ((heads + 2 * groups) * size // ranks, hidden)
    return sizes


def _core_args(args: Namespace, ranks: int) -> Namespace:
    """Megatron-DeepSpeed's arguments as stock Megatron compares them with its own."""
    values = vars(args) | {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": 1}
    if values.pop("use_rotary_position_embeddings", False):
        values["position_embedding_type"] = "rope"
        values.pop("add_position_embedding", None)
    groups = values.pop("num_key_value_heads", None)
    if groups and groups != values.get("num_attention_heads"):
        values |= {"num_query_groups": groups, "group_query_attention": True}
    if values.get("normalization") == "rmsnorm":
        values["normalization"] = "RMSNorm"
    return Namespace(**values)


def tiled_rank(rank: Rank, ranks: int, splits: deepspeed_keys.Splits, core: bool) -> dict[str, Any]:
    """What DeepSpeed's engine loads of a dense rank, as one of ``ranks``; with ``core`` under megatron-core's names."""
    state = deepspeed_keys.split_tiles(_dense_state(rank.state, rank, ranks), splits, ranks)
    module = state if core else deepspeed_names.nest(deepspeed_names.deepspeed_names(state))
    tiled: dict[str, Any] = {"module": module, "checkpoint_version": 3.0, "iteration": rank.iteration}
    # What DeepSpeed's engine looks up without asking whether it is there.
    tiled |= {"global_steps": rank.iteration, "global_samples": 0, "skipped_steps": 0, "dp_world_size": 1}
    tiled |= {"mp_world_size": ranks, "optimizer": None, "lr_scheduler": None, "sparse_tensor_module_names": set()}
    return tiled if rank.args is None else tiled | {"args": rank.args}


def convert(source: Path, target: Path, splits: deepspeed_keys.Splits | None = None, core: bool = False) -> str:
    """Write a dense checkpoint, or with ``splits`` a tile-keyed one, into the new folder ``target``.

    The folder appears when it is whole; one rank's weights are in memory at a time.

    Returns:
        What was done, and how to load it.

    Raises:
        Refused: ``target`` exists, or ``source`` cannot be converted.
    """
    if target.exists():
        raise Refused(f"{target} exists, and is left as it is: give a new folder")
    files = find_ranks(source)
    layouts: list[dict[str, str]] = []
    place = next(folder for folder in target.parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}.") as temporary:
        made = Path(temporary, "checkpoint")
        for number, path in enumerate(files):
            rank = read(path)
            _check(rank, path, len(files), wants_tiles=splits is None)
            layouts.append(rank.layout())
            _check_same(layouts[0], layouts[-1], files[0], path)
            try:
                content = dense_rank(rank, len(files)) if splits is None else tiled_rank(rank, len(files), splits, core)
            except ValueError as error:
                raise Refused(f"{path}: {error}") from None
            file = made / _place(rank.iteration, number, dense=splits is None)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, file)
        (made / MEGATRON_TRACKER).write_text(str(rank.iteration))  # Megatron-DeepSpeed reads it too
        if splits is not None:
            (made / DEEPSPEED_TRACKER).write_text(f"global_step{rank.iteration}")
        if target.exists():
            raise Refused(f"{target} has come to exist, and is left as it is")
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)
    what = f"{source} is converted to {target}, {len(files)} tensor-parallel rank{'s' if len(files) > 1 else ''}"
    if splits is None:
        what += "; load it with --load and --finetune, or --no-load-optim --no-load-rng to go on at its iteration"
    return what


def _check(rank: Rank, path: Path, ranks: int, wants_tiles: bool) -> None:
    if deepspeed_keys.is_tiled(rank.state) != wants_tiles:
        raise Refused(f"{path} {'has no tile keys' if wants_tiles else 'has tile keys already'}")
    in_args = getattr(rank.args, "tensor_model_parallel_size", getattr(rank.args, "model_parallel_size", ranks))
    for world in (in_args, ranks if rank.world is None else rank.world):
        if world != ranks:
            raise Refused(f"{path} is one of {world} tensor-parallel ranks, but there are files of {ranks}")
    if getattr(rank.args, "pipeline_model_parallel_size", 1) != 1:
        raise Refused(f"{path} is of a pipeline: save it with one pipeline stage")


def _check_same(first: dict[str, str], other: dict[str, str], first_path: Path, path: Path) -> None:
    """Files that belong together are of one iteration, and every rank has the same share of every weight."""
    for name in first | other:
        one, two = first.get(name, "missing"), other.get(name, "missing")
        if one != two:
            raise Refused(f"{first_path} and {path} are not of one checkpoint: {name} is {one} and {two}")


def _place(iteration: int, rank: int, dense: bool) -> str:
    if dense:
        return f"iter_{iteration:07d}/mp_rank_{rank:02d}/model_optim_rng.pt"
    return f"global_step{iteration}/mp_rank_{rank:02d}_model_states.pt"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 1 refused and nothing written, 2 misused."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tiling.convert_deepspeed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    dense = commands.add_parser("to-dense", help="from tile keys to what stock Megatron loads")
    tiled = commands.add_parser("to-tiled", help="from dense keys to what DeepSpeed's TiledLinear loads")
    dense.set_defaults(tiled_linear_splits=None, core_names=False)
    for command in (dense, tiled):
        command.add_argument("source", type=Path, metavar="SOURCE", help="folder of the checkpoint; pickles: trust it")
        command.add_argument("target", type=Path, metavar="TARGET", help="new folder")
    tiled.add_argument(
        "--tiled-linear-splits",
        nargs="+",
        required=True,
        metavar="MODULE=INxOUT",
        help="grids of qkv, proj, fc1, fc2 and output; Megatron-LM 1.1.5's ZeRO-3 tree, at --tile-factor N, has "
        "qkv=Nx3N proj=NxN fc1=Nx4N fc2=4NxN",
    )
    tiled.add_argument(
        "--core-names", action="store_true", help="megatron-core's layer names instead of Megatron-DeepSpeed's"
    )
    options = parser.parse_args(arguments)
    try:
        splits = None if options.tiled_linear_splits is None else parse_splits(options.tiled_linear_splits)
        if "experts" in (splits or {}):
            raise Refused("--tiled-linear-splits experts: grouped experts have no tile keys; leave it out")
        done = convert(options.source, options.target, splits, options.core_names)
    except (ValueError, OSError) as error:
        print(f"megatron_tiling.convert_deepspeed: {error}", file=sys.stderr)
        return 1
    print(f"megatron_tiling.convert_deepspeed: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

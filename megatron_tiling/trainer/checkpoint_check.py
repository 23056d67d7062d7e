"""A checkpoint that cannot be loaded ends the run with one line that names the file or folder, and what is wrong.

Stock Megatron answers some of these with a trace that names neither, ends with exit code 0 where a file of the legacy
format cannot be read, and goes on with random weights where such a file has other keys. So the checkpoint is looked
at before stock loads it, and nothing of it is ever written. Errors of any other kind are stock's, trace and all.

The formats are ``torch_dist`` (``iter_0000100/metadata.json``, ``.metadata``, ``*.distcp``) and legacy ``torch``
(``iter_0000100/mp_rank_00/model_optim_rng.pt``); other formats are left to stock.
"""

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tiling.tiles.deepspeed_keys import TILE_KEY, flatten

TRACKER = "latest_checkpointed_iteration.txt"
MANY = 3


class CheckpointError(ValueError):
    """The checkpoint is not one for this run; the message names the file or folder."""


def check_on_all_ranks(args: Namespace, load_arg: str, model: list[torch.nn.Module], strict: bool) -> Path | None:
    """``check_checkpoint`` on every rank; if any rank finds a fault, all end, and the first of them says why.

    Args:
        load_arg: the name of the argument that holds the folder.

    Returns:
        The folder that was looked at, if there is one.

    Raises:
        SystemExit: with the line on the first rank that found a fault, with exit code 1 and no line on others.
    """
    if getattr(args, "non_persistent_ckpt_type", None):
        return None  # stock may take such a checkpoint from elsewhere
    load_dir = getattr(args, load_arg)
    if load_dir is None or not Path(load_dir, TRACKER).is_file():
        load_dir = getattr(args, "pretrained_checkpoint", None) or load_dir
    fault = folder = None
    try:
        folder = check_checkpoint(args, load_dir, model, strict)
    except CheckpointError as error:
        fault = str(error)
    faults: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(faults, fault)
    first = next((rank for rank, found in enumerate(faults) if found), None)
    if first is not None:
        raise SystemExit(f"megatron_tiling: {fault}" if first == torch.distributed.get_rank() else 1)
    return folder


def check_checkpoint(
    args: Namespace, load_dir: str | None, model: list[torch.nn.Module], strict: bool = True
) -> Path | None:
    """Look at the checkpoint that Megatron is about to load into ``model``.

    Args:
        args: Megatron's arguments.
        load_dir: the folder that holds checkpoints and the tracker file.
        model: this rank's model chunks, unwrapped.
        strict: the model takes all of its weights from the checkpoint.

    Returns:
        Its folder; ``None`` where stock starts from random weights.

    Raises:
        CheckpointError: it is damaged, incomplete, of another model, or has DeepSpeed's tile keys.
    """
    folder = _checkpoint_folder(args, load_dir)
    if folder is None:
        return None
    if (folder / "metadata.json").exists():
        _check_distributed(folder, model)
    elif (folder / ".metadata").exists() and args.ckpt_format == "torch_dist" and not args.auto_detect_ckpt_format:
        raise CheckpointError(f"{folder / 'metadata.json'} is missing: it says that the checkpoint is a torch_dist one")
    elif any(folder.glob("mp_rank_*")):
        _check_legacy(_rank_file(folder), model, strict)
    return folder


def _checkpoint_folder(args: Namespace, load_dir: str | None) -> Path | None:
    """The folder of the iteration that will be loaded; ``None`` where stock starts from random weights."""
    if load_dir is None or not Path(load_dir).is_dir():
        return None
    if _deepspeed_files(Path(load_dir)):
        _refuse_deepspeed(Path(load_dir))
    tracker = Path(load_dir, TRACKER)
    if getattr(args, "ckpt_step", None):
        name = str(args.ckpt_step)
    elif tracker.is_file():
        name = tracker.read_text().strip()
    else:
        return None
    if name != "release" and not name.isdigit():
        raise CheckpointError(f"{tracker} should hold an iteration, and holds {name!r}")
    folder = Path(load_dir, name if name == "release" else f"iter_{int(name):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"there is no {folder}, the checkpoint that {tracker} or --ckpt-step names")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty")
    return folder


def _deepspeed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*mp_rank_*_model_states.pt")) + sorted(folder.glob("*/*mp_rank_*_model_states.pt"))


def _refuse_deepspeed(folder: Path) -> None:
    raise CheckpointError(
        f"{_deepspeed_files(folder)[0]} is a checkpoint of DeepSpeed's; convert it with "
        f"python -m megatron_tiling.convert_deepspeed to-dense {folder} NEW_FOLDER"
    )


def _check_distributed(folder: Path, model: list[torch.nn.Module]) -> None:
    """``torch_dist``: all files that the metadata lists are there and as long as it says, all shapes the model's."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{folder / '.metadata'} cannot be read, is it whole? {_brief(error)}") from None
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint's .metadata lists it")
        if file.stat().st_size < end:
            raise CheckpointError(f"{file} is cut off: it has {file.stat().st_size} bytes of at least {end}")
    if (folder / "common.pt").is_file():
        _read(folder / "common.pt")
    elif not any(key.startswith("common_state") for key in metadata.state_dict_metadata):
        raise CheckpointError(f"{folder / 'common.pt'} is missing")  # from 0.19 on it is among the shards
    entries = metadata.state_dict_metadata.items()
    saved = {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
    _refuse_tile_keys(folder, saved)
    _compare(folder, {key: shape for key, shape in _global_shapes(model).items() if key in saved}, saved)


def _global_shapes(model: list[torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Keys and whole shapes under which the model would save itself, of the entries that have one shape."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    sharded = [chunk.sharded_state_dict() for chunk in model if hasattr(chunk, "sharded_state_dict")]  # type: ignore[operator]
    tensors = [value for state in sharded for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors if not tensor.allow_shape_mismatch}


def _rank_file(folder: Path) -> Path:
    from megatron.training.checkpointing import get_checkpoint_name

    iteration, release = (0, True) if folder.name == "release" else (int(folder.name.removeprefix("iter_")), False)
    return Path(get_checkpoint_name(str(folder.parent), iteration, release))


def _check_legacy(file: Path, model: list[torch.nn.Module], strict: bool) -> None:
    """``torch``: this rank's file is there and whole, and has the model's keys and shapes."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: a legacy checkpoint has a file for each tensor- and pipeline-parallel rank, "
            "and as many ranks load it as have saved it"
        )
    content = _read(file)
    for number, chunk in enumerate(model):
        saved = content.get("model" if len(model) == 1 else f"model{number}")
        if not isinstance(saved, Mapping):
            continue
        shapes = {key: tuple(value.shape) for key, value in flatten(saved).items()}
        _refuse_tile_keys(file, shapes)
        wanted = {key: tuple(value.shape) for key, value in flatten(chunk.state_dict_for_save_checkpoint()).items()}  # type: ignore[operator]
        missing = [key for key in wanted if key not in shapes]
        if missing and strict:
            raise CheckpointError(f"{file} has no {_some(missing)}, of the model that these arguments build")
        _compare(file, {key: shape for key, shape in wanted.items() if key in shapes}, shapes)


def _read(file: Path) -> dict[str, Any]:
    """A file that ``torch.save`` wrote, its tensors mapped and not read where the format allows it.

    Empty if its pickle holds what torch does not take unasked: whether to trust it is stock's to decide.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported (global|class)", str(error)):
            return {}
        raise CheckpointError(f"{file} cannot be read, is it whole? {_brief(error)}") from None
    return content


def _refuse_tile_keys(place: Path, keys: Iterable[str]) -> None:
    tiled = [key for key in keys if TILE_KEY.fullmatch(key)]
    if tiled:
        raise CheckpointError(
            f"{place} has tile keys as DeepSpeed's TiledLinear saves them, {_some(tiled)}; convert the checkpoint with "
            "python -m megatron_tiling.convert_deepspeed to-dense"
        )


def _compare(place: Path, wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> None:
    differing = [key for key, shape in wanted.items() if saved[key] != shape]
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"{place} is of another model: {first} is {list(saved[first])} there, and {list(wanted[first])} with these "
            f"arguments{f'; {len(differing) - 1} more differ' if len(differing) > 1 else ''}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {re.split(r'[\n.]', str(error))[0]}"

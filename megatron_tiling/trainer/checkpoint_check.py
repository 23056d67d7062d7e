"""A checkpoint that cannot be loaded ends the run with one line that names the file or folder, and what is wrong.

Stock Megatron answers some of these with a trace that names neither, ends with exit code 0 where a file of the legacy
format cannot be read, and goes on with random weights where such a file has other keys. So the checkpoint is looked
at before stock loads it, and nothing of it is ever written. Errors of any other kind are stock's, trace and all.

Rank 0 looks at what all ranks load, and tells the others; each rank compares its own part of the model, and looks at
its own file of the legacy format. Whatever any of them meets, all get to know.

The formats are ``torch_dist`` (``iter_0000100/metadata.json``, ``.metadata``, ``*.distcp``) and legacy ``torch``
(``iter_0000100/mp_rank_00/model_optim_rng.pt``); other formats are left to stock.
"""

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Found:
    """A checkpoint that will be loaded.

    Attributes:
        shapes: for ``torch_dist``, the whole shapes of its tensors by key.
        legacy: it has a file a rank.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]] | None = None
    legacy: bool = False


def check_on_all_ranks(args: Namespace, load_arg: str, model: list[torch.nn.Module], strict: bool) -> Path | None:
    """Look at the checkpoint that Megatron is about to load into ``model``. Collective.

    Args:
        args: Megatron's arguments.
        load_arg: the name of the argument that holds the folder of checkpoints and tracker file.
        model: this rank's model chunks, unwrapped.
        strict: the model takes all of its weights from the checkpoint.

    Returns:
        The checkpoint's folder; ``None`` where stock starts from random weights, or takes it from elsewhere.

    Raises:
        SystemExit: it is damaged, incomplete, of another model, or has DeepSpeed's tile keys. With the line on the
            first rank that found a fault, with exit code 1 and no line on others.
    """
    if getattr(args, "non_persistent_ckpt_type", None):
        return None
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        answer = [_found_or_fault(lambda: find_checkpoint(args, _load_dir(args, load_arg)))]
    torch.distributed.broadcast_object_list(answer, src=0)
    found = answer[0]
    if isinstance(found, Found):
        answer = [_found_or_fault(lambda: _compare_with_model(found, model, strict))]
    faults: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(faults, answer[0] if isinstance(answer[0], str) else None)
    first = next((rank for rank, fault in enumerate(faults) if fault), None)
    if first is not None:
        raise SystemExit(f"megatron_tiling: {faults[first]}" if first == torch.distributed.get_rank() else 1)
    return found.folder if found else None


def _found_or_fault(look: Callable[[], Found | None]) -> Found | str | None:
    """What ``look`` returns, or the line that says why it did not."""
    try:
        return look()
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # of one rank: the others would wait for it
        return f"the checkpoint cannot be looked at, {type(error).__name__}: {' '.join(str(error).split())}"


def _load_dir(args: Namespace, load_arg: str) -> str | None:
    """Raises a CheckpointError where stock would not start: it must find a pre-trained checkpoint that is named."""
    from megatron.training.checkpointing import checkpoint_exists

    load_dir: str | None = getattr(args, load_arg)
    if not checkpoint_exists(load_dir):
        pretrained = getattr(args, "pretrained_checkpoint", None)
        if pretrained is not None and not checkpoint_exists(pretrained):
            looked_at = f", nor in --{load_arg.replace('_', '-')} {load_dir}" if load_dir is not None else ""
            raise CheckpointError(f"--pretrained-checkpoint {pretrained}: there is no {TRACKER} in it{looked_at}")
        load_dir = pretrained or load_dir
    return load_dir


def find_checkpoint(args: Namespace, load_dir: str | None) -> Found | None:
    """The checkpoint that stock will take of ``load_dir``; ``None`` where it starts from random weights.

    Raises:
        CheckpointError: it is damaged, incomplete, or has DeepSpeed's tile keys.
    """
    folder = _checkpoint_folder(args, load_dir)
    if folder is None:
        return None
    if (folder / "metadata.json").exists():
        return Found(folder, _distributed_shapes(folder))
    if (folder / ".metadata").exists() and args.ckpt_format == "torch_dist" and not args.auto_detect_ckpt_format:
        raise CheckpointError(f"{folder / 'metadata.json'} is missing: it says that the checkpoint is a torch_dist one")
    return Found(folder, legacy=any(folder.glob("mp_rank_*")))


def _compare_with_model(found: Found, model: list[torch.nn.Module], strict: bool) -> None:
    """Raise a CheckpointError if the checkpoint, or this rank's file of it, is not one of the model."""
    if found.shapes is not None:
        _compare(found.folder, _global_shapes(model), found.shapes)
    elif found.legacy:
        _check_legacy(_rank_file(found.folder), model, strict)


def _checkpoint_folder(args: Namespace, load_dir: str | None) -> Path | None:
    """The folder of the iteration that will be loaded; ``None`` where stock starts from random weights."""
    if load_dir is None or not Path(load_dir).is_dir():
        return None
    models = "mp_rank_*_model_states.pt"
    if deepspeed := sorted(Path(load_dir).glob(f"*{models}")) + sorted(Path(load_dir).glob(f"*/*{models}")):
        raise CheckpointError(
            f"{deepspeed[0]} is a checkpoint of DeepSpeed's; convert it with "
            f"python -m megatron_tiling.convert_deepspeed to-dense {load_dir} NEW_FOLDER"
        )
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


def _distributed_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of ``torch_dist``, whose files must be there, those of its metadata as long as it says."""
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
    return saved


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
        _compare(file, wanted, shapes)


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
    """Of the entries that both have."""
    differing = [key for key, shape in wanted.items() if saved.get(key, shape) != shape]
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

"""Continue from a checkpoint of DeepSpeed's engine, if it is one that this run can continue.

ZeRO-3 saves parameters and optimizer states as flat partitions without names, so an engine with other tiles takes
them where the sizes happen to agree: permuted. DeepSpeed writes the names and shapes of what it has flattened beside
them, and these are compared before anything is loaded. Every rank looks at its own files, and all hear what is wrong.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.ownership import whole_shape

Shapes = dict[str, tuple[int, ...]]
REMEDY = "go through a dense checkpoint (zero3.save_dense, zero3.load_dense)"


def load_checkpoint(
    engine: Any, folder: str | Path, tag: str | None = None
) -> tuple[str | None, dict[str, Any] | None]:
    """``engine.load_checkpoint(folder, tag)`` (collective), once the checkpoint is known to be this engine's.

    Args:
        engine: from ``zero3.initialize``, before its first step.
        folder: what was given to ``engine.save_checkpoint``.
        tag: a folder in it; by default the one that its file ``latest`` names.

    Returns:
        DeepSpeed's path and client state; ``(None, None)`` where no checkpoint has been saved yet.

    Raises:
        ValueError: on every rank, if files are missing, cut off or not of one save, or if another number of ranks or
            other tiles have saved them.
    """
    step = fault = None
    try:
        tag = _tag_in(Path(folder)) if tag is None else tag
        step = None if tag is None else _check(engine, Path(folder), tag)
    except (ValueError, OSError) as error:
        fault = str(error)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (tag, step, fault))
    if found := next((fault for *_, fault in everyone if fault is not None), None):
        raise ValueError(found)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ValueError(
                f"{folder} holds files of more than one save: {everyone[0][0]} at step {everyone[0][1]} on rank 0, "
                f"{other[0]} at step {other[1]} on rank {rank}; load an earlier checkpoint"
            )
    if tag is None:
        return None, None
    path, state = engine.load_checkpoint(str(folder), tag)
    return path, state


def refuse_other_tiles(model: torch.nn.Module) -> None:
    """``engine.load_checkpoint`` called directly does not take the partitions of other tiles, strictly or not."""

    def compare(model: Any, state_dict: Any, prefix: str, _metadata: Any, strict: bool, *lists: list[str]) -> None:
        # The engine saves nothing in place of what it has partitioned, and loads flat partitions next.
        partitioned = {key for key, value in state_dict.items() if isinstance(value, Tensor) and value.numel() == 0}
        wanted = {prefix + name for name, _ in model.named_parameters()}
        others = sorted((partitioned - wanted) | (wanted - state_dict.keys() if partitioned else set()))
        if others:
            *_, errors = lists
            errors.append(f"saved with other tiles: {others[0]} is {'' if others[0] in wanted else 'not '}wanted here")

    model.register_load_state_dict_pre_hook(compare)


def _tag_in(folder: Path) -> str | None:
    latest = folder / "latest"
    return latest.read_text().strip() if latest.is_file() else None


def _check(engine: Any, folder: Path, tag: str) -> int:
    """Raise a ValueError if this rank's files are not of an engine like this. Returns the step they were saved at."""
    place = folder / tag
    if not place.is_dir():
        raise ValueError(f"there is no {place}, the checkpoint that {folder / 'latest'} or a tag names")
    model = Path(engine._get_ckpt_name(str(folder), tag))
    saved = _read(model)
    ranks = {
        "data": (saved["dp_world_size"], engine.dp_world_size),
        "tensor": (saved["mp_world_size"], engine.mp_world_size),
    }
    for kind, (then, now) in ranks.items():
        if then != now:
            raise ValueError(
                f"{place} was saved by {then} {kind}-parallel ranks, and this run has {now}: use as many, or {REMEDY}"
            )
    optimizer = model.name.replace("_model_states.pt", "_optim_states.pt")
    states = next((file for file in (place / optimizer, place / f"bf16_{optimizer}") if file.is_file()), None)
    if states is None:
        raise ValueError(f"{place / optimizer} is missing: every rank has saved such a file")
    if not zipfile.is_zipfile(states):
        raise ValueError(f"{states} cannot be read, is it whole?")
    groups = [*(saved["param_shapes"] or []), saved.get("frozen_param_shapes") or {}]
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    _compare(place, shapes, {name: tuple(whole_shape(one)) for name, one in engine.module.named_parameters()})
    return int(saved["global_steps"])


def _read(file: Path) -> dict[str, Any]:
    """What the engine has saved of itself, and will unpickle, too."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: every rank of a ZeRO-3 engine has saved such a file")
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # a zip or a pickle that is cut off fails in many ways
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{file} cannot be read, is it whole? {type(error).__name__}: {first_line}") from None
    if not isinstance(saved, dict) or not {"dp_world_size", "mp_world_size", "param_shapes"} <= saved.keys():
        raise ValueError(f"{file} was not saved by a ZeRO-3 engine")
    return saved


def _compare(folder: Path, saved: Shapes, wanted: Shapes) -> None:
    for name in saved | wanted:
        then, now = saved.get(name), wanted.get(name)
        if then == now:
            continue
        there, here = ("missing" if shape is None else list(shape) for shape in (then, now))
        tiled = "tiles" in name.split(".") or then is None or now is None
        raise ValueError(
            f"{folder} was saved with {'other tiles' if tiled else 'another model'}: {name} is {there} there and "
            f"{here} here; give --tile-factor, --tiled-linear-splits and the model's sizes as they were, or {REMEDY}"
        )

"""Continue from a checkpoint of DeepSpeed's engine, if it is one that this run can continue.

ZeRO-3 saves parameters and optimizer states as flat partitions without names, so an engine with other tiles takes
them where the sizes happen to agree: permuted. DeepSpeed writes the names and shapes of what it has flattened beside
them, and these are compared before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_tiling.tiles.ownership import whole_shape

Shapes = dict[str, tuple[int, ...]]


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
        ValueError: on every rank, if files are missing or another number of ranks or other tiles have saved it.
    """
    found: list[str | None] = [None, None]  # tag, fault
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = tag = _tag_in(Path(folder)) if tag is None else tag
            if tag is not None:
                _check(engine, Path(folder, tag))
        except (ValueError, OSError) as error:
            found[1] = str(error)
    torch.distributed.broadcast_object_list(found)
    tag, fault = found
    if fault is not None:
        raise ValueError(fault)
    if tag is None:
        return None, None
    path, state = engine.load_checkpoint(str(folder), tag)
    return path, state


def _tag_in(folder: Path) -> str | None:
    latest = folder / "latest"
    return latest.read_text().strip() if latest.is_file() else None


def _check(engine: Any, folder: Path) -> None:
    """Raise a ValueError if the checkpoint in ``folder`` is not one of an engine like this."""
    if not folder.is_dir():
        raise ValueError(f"there is no {folder}, the checkpoint that {folder.parent / 'latest'} or a tag names")
    some = next(iter(sorted(folder.glob("zero_pp_rank_*_model_states.pt"))), None)
    if some is None:
        raise ValueError(f"{folder} has no files of a ZeRO-3 engine (zero_pp_rank_*_model_states.pt)")
    try:  # the engine unpickles it too
        saved = torch.load(some, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:
        raise ValueError(f"{some} cannot be read, is it whole? {type(error).__name__}: {error}") from None
    ranks = {
        "data": (saved["dp_world_size"], engine.dp_world_size),
        "tensor": (saved["mp_world_size"], engine.mp_world_size),
    }
    for kind, (then, now) in ranks.items():
        if then != now:
            raise ValueError(
                f"{folder} was saved by {then} {kind}-parallel ranks, and this run has {now}: use as many, or go "
                "through a dense checkpoint (--save-dense, --load-dense)"
            )
    for data in range(saved["dp_world_size"]):
        for tensor in range(saved["mp_world_size"]):
            for kind in ("model", "optim"):
                name = f"zero_pp_rank_{data}_mp_rank_{tensor:02d}_{kind}_states.pt"
                if not (folder / name).is_file() and not (folder / f"bf16_{name}").is_file():
                    raise ValueError(f"{folder / name} is missing: every rank has saved such a file")
    _compare(folder, _saved_shapes(saved), _shapes(engine.module))


def _shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters()}


def _saved_shapes(saved: dict[str, Any]) -> Shapes:
    groups = [*(saved["param_shapes"] or []), saved.get("frozen_param_shapes") or {}]
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _compare(folder: Path, saved: Shapes, wanted: Shapes) -> None:
    for name in saved | wanted:
        then, now = saved.get(name), wanted.get(name)
        if then == now:
            continue
        there, here = ("missing" if shape is None else list(shape) for shape in (then, now))
        tiled = "tiles" in name.split(".") or then is None or now is None
        raise ValueError(
            f"{folder} was saved with {'other tiles' if tiled else 'another model'}: {name} is {there} there and "
            f"{here} here; give --tile-factor, --tiled-linear-splits and the model's sizes as they were, or go through "
            "a dense checkpoint (--save-dense, --load-dense)"
        )

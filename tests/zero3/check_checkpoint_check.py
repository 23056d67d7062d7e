"""Checkpoints of the engine: what this run can continue, and what it refuses. Called by check_engine."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.zero3.small_gpt import averaged, close, engine_of, loss_of, micro_batches, train_zero3, transformer


def check_resuming(report: Any) -> None:
    """A checkpoint continues with its own tiles; others, and faulty files, end every rank the same way."""
    from megatron_tiling import zero3

    rank = torch.distributed.get_rank()
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    torch.distributed.broadcast_object_list(shared)
    folder = Path(shared[0])
    saved = engine_of(transformer(), tiled=True, thresholds={})
    train_zero3(saved, 2)
    saved.save_checkpoint(str(folder), tag="two")
    expected, _ = train_zero3(saved, 2)

    def message(load: Any, engine: Any) -> str:
        """What every rank says, if it is the same."""
        try:
            load(engine, str(folder))
            mine = "loaded"
        except (ValueError, RuntimeError) as error:
            mine = str(error)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return mine if len(set(everyone)) == 1 else str(everyone)

    for factor in (2, 8):
        other = engine_of(transformer(), tiled=True, thresholds={}, factor=factor)
        before = averaged([loss_of(other, *next(micro_batches(0)))])
        for strict in (True, False):
            load = partial(type(other).load_checkpoint, load_module_strict=strict)
            found = message(load, other)
            report(f"{factor} tiles, strict={strict}, are refused by the engine", "with other tiles" in found, found)
        found = message(zero3.load_checkpoint, other)
        report(f"{factor} tiles are refused", "was saved with other tiles: " in found and "\n" not in found, found)
        after = averaged([loss_of(other, *next(micro_batches(0)))])
        report(f"{factor} tiles load nothing", after == before, (before, after))

    engine = engine_of(transformer(), tiled=True, thresholds={})
    lost, cut = (f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim"))
    for words, name in ((f"{lost} is missing", lost), (f"{cut} cannot be read", cut), ("more than one save", lost)):
        file = folder / "two" / name
        whole = file.read_bytes()
        torch.distributed.barrier()
        if rank == 0 and "missing" in words:
            file.unlink()
        elif rank == 0 and "read" in words:
            file.write_bytes(whole[:-100])
        elif rank == 0:
            torch.save(torch.load(file, weights_only=False) | {"global_steps": 1}, file)
        torch.distributed.barrier()
        found = message(zero3.load_checkpoint, engine)
        report(f"a checkpoint where {words}", words in found and "\n" not in found, found)
        torch.distributed.barrier()
        if rank == 0:
            file.write_bytes(whole)
        torch.distributed.barrier()
    zero3.load_checkpoint(engine, folder)
    losses, _ = train_zero3(engine, 2)
    report("the checkpoint continues", close(losses, expected, 1e-6), (losses, expected))

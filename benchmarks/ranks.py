"""What the ranks of a benchmark decide together, and how they end together. Of one process it is its own."""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def count() -> int:
    """Ranks that torchrun has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_count(parser: argparse.ArgumentParser, flag: str, size: int) -> None:
    """Refuse a flag that asks for another number of processes than there are."""
    if size != count():
        parser.error(f"{flag} {size}: there are {count()} processes; torchrun --nproc-per-node {size} starts {size}")


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on the first rank."""
    if is_first():
        print(text, flush=True)


def largest(*values: float) -> list[float]:
    """Of each value the largest over all ranks: the same everywhere. A collective, which all ranks reach together."""
    if count() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [float(value) for value in found.tolist()]


def of_first(number: int) -> int:
    """The first rank's number, below 2**63. A collective."""
    if count() == 1:
        return number
    found = torch.tensor([number], dtype=torch.int64, device=_device())
    dist.broadcast(found, src=0)
    return int(found.item())


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def ending_together() -> Iterator[None]:
    """A rank that fails prints its trace and leaves at once; torchrun then ends those that wait for it.

    It takes no leave of its process groups, where it could wait for the others' collectives.
    """
    try:
        yield
    except BaseException:
        if count() == 1:
            raise
        print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

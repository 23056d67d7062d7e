"""A training run on a GPU of that much memory, of which it runs out in its second step if it is told to.

    torchrun ... tests/trainer/check_planned.py GIB PLACE SCRIPT FLAG...

There is no GPU: PLACE, of ``PLACES`` or ``nowhere``, is where the error is raised.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_tiling import __main__ as runner
from megatron_tiling.resident.mlp import TiledMLP
from megatron_tiling.tiles import mlp
from megatron_tiling.trainer import planned

LAYERS = 2
#: A method, and how often it is called until then.
PLACES: dict[str, tuple[Any, str, int]] = {
    "building": (torch.optim.Optimizer, "__init__", 0),
    "forward": (TiledMLP, "forward", LAYERS),
    "backward": (mlp._Backward, "run", LAYERS),
    "optimizer": (torch.optim.SGD, "step", 1),
}


def raise_at(owner: Any, name: str, number: int) -> None:
    stock: Callable[..., Any] = getattr(owner, name)
    calls: list[bool] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        if len(calls) == number + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Raised by a test.")
        return stock(*args, **kwargs)

    setattr(owner, name, call)


def main() -> None:
    gib, place, *argv = sys.argv[1:]
    planned.gpu_memory_gib = lambda: float(gib)
    planned.SECONDS = 900  # machines are busy
    stock = planned.ask

    def ask(asked: Any) -> Any:
        print("ASKED", flush=True)
        return stock(asked)

    planned.ask = ask
    if place in PLACES:
        raise_at(*PLACES[place])
    sys.argv = ["megatron_tiling", *argv]
    runner.main()


if __name__ == "__main__":
    main()

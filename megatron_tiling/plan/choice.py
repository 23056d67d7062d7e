"""One setting of a command that fits, as a line of JSON: what a training run asks for (``trainer/planned.py``).

    python -m megatron_tiling.plan.choice [--gpu-memory-gib N] [--gpus N] [--outside-gib N] [--below N] SCRIPT [ARGS]

Of a command with ``--tile-factor auto`` or ``--tiled-mlp-keep auto`` it is the first of what these may be, else the
best of the settings that the planner compares.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

from megatron_tiling.plan import routing
from megatron_tiling.plan.automatic import automatic_flags
from megatron_tiling.plan.command import GIB, TILED, Command, Plan, Setting, undominated
from megatron_tiling.plan.options import refuse_dashes_behind, shared_parser
from megatron_tiling.plan.room import room
from megatron_tiling.plan.run import prepare
from megatron_tiling.plan.tracker import Tracker
from megatron_tiling.trainer.planned import ANSWER, GPU_MEMORY_GIB


def automatic(command: Command, tracker: Tracker, limit: float) -> dict[str, Any]:
    """Of what ``auto`` may be: the fastest that fits, and the one before it.

    Raises:
        SystemExit: none of it runs.
    """
    found = command.tried(tracker, limit)
    fits = found[-1].run.peak <= limit
    return {
        "best": _described(found[-1]) if fits else None,
        "before": _described(found[-2]) if fits and len(found) > 1 else None,
        "smallest": _described(min(found, key=lambda one: one.run.peak)),
        "settings": len(command.automatic),
    }


def instead(command: Command, tracker: Tracker, limit: float, below: float) -> dict[str, Any]:
    """The command as given, and the best setting that fits and takes less than ``below`` of it.

    Of those that the planner compares, and of those that keep some tiles of an MLP, between all and none.

    Raises:
        SystemExit: the command does not run.
    """
    between = [
        Setting(f"{TILED} {keep}", [*command.arguments, TILED, *keep.split()])
        for keep in automatic_flags(["--tiled-mlp-keep", "auto"])[1:-1]
    ]
    given, *others = command.plan([command.tiled, command.dense, *command.others(), *between], tracker)
    if isinstance(given, str):
        raise SystemExit(given)
    found = [one for one in others if isinstance(one, Plan)]
    fitting = [one for one in undominated(found) if one.run.peak <= min(limit, below * given.run.peak)]
    return {
        "given": _described(given),
        "best": _described(fitting[0]) if fitting else None,
        "smallest": _described(min(found or [given], key=lambda one: one.run.peak)),
        "settings": len(found) + 1,
        "advice": command.advice,
    }


def _described(one: Plan) -> dict[str, Any]:
    return {"flags": one.flags, "gib": one.run.peak / GIB, "phase": one.run.phase}


def main() -> None:
    """Print the answer.

    Raises:
        SystemExit: there is none; the last line of what it says is why.
    """
    parser = shared_parser()
    parser.add_argument("--below", type=float, default=1.0, help="of the peak of the command as given, what may be had")
    options = parser.parse_args()
    refuse_dashes_behind(parser, sys.argv[1:], options.arguments)
    command = Command(options.script, options.arguments, options.gpus)
    warnings.simplefilter("ignore")  # Megatron's, of packages that are not installed here
    tracker = prepare(command.with_transformer_engine, options.expert_imbalance, options.script)
    memory = GPU_MEMORY_GIB if options.gpu_memory_gib is None else options.gpu_memory_gib
    left = room(memory, options.outside_gib, os.environ)
    limit = left.peak * GIB
    if command.automatic:
        answer = automatic(command, tracker, limit)
    else:
        answer = instead(command, tracker, limit, options.below)
    supposed = f" (experts: {routing.stated():g} times balanced rows)" if command.has_experts else ""
    rooms = {"limit_gib": left.peak, "torch_gib": left.torch, "fragmentation": left.fragmentation}
    print(ANSWER + json.dumps(answer | rooms | {"supposed": supposed}))


if __name__ == "__main__":
    main()

"""The last line of a rank that dies of memory: in which phase, and the setting that would have fitted.

The error goes on as it came, with the line as a note, which Python prints under it. What is said is looked for after
the fact and may take the planner's time; nothing is written, and nothing of the run is used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_tiling.arguments import AUTOMATIC
from megatron_tiling.config import argument_of
from megatron_tiling.log import logger
from megatron_tiling.trainer import planned
from megatron_tiling.trainer.phases import phase_of

#: Of the peak that the planner gives the command: a setting that shall fit where this one did not is smaller still.
BELOW = 0.98
GIB = 2**30


@contextmanager
def saying_what_fits(args: Any, building: bool = False) -> Iterator[None]:
    """Around building a model, or a training step, where ``args``, Megatron's, ask for tiles; else ``None``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if args is not None:
            phase = "building the model and its optimizer" if building else phase_of(error)
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            error.add_note(f"megatron_tiling: rank {rank} is out of memory in {phase}. {_advice(args)}")
        raise


def _advice(args: Any) -> str:
    values = {flag: getattr(args, argument_of(flag), None) for flag in AUTOMATIC}  # what was ``auto`` is a choice now
    chosen = [word for flag, value in values.items() if value is not None for word in (flag, str(value))]
    asked = ["--below", str(BELOW), *planned.command(chosen)]
    left = _left_by_others()

    def work() -> str:
        logger.info(f"out of memory: the planner is asked what fits, for {planned.SECONDS} s at most")
        try:
            return _words(planned.ask(asked), left)
        except planned.NoPlan as none:
            return f"There is no plan of this command ({none}). To see what fits: {planned.command_to_run()}"

    try:
        return planned.once_in_a_run("out of memory", work)
    except planned.NoPlan:
        return f"To see what fits: {planned.command_to_run()}"


def _left_by_others() -> float | None:
    """GiB that this process has, or could take, of its GPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) / GIB


def _words(answer: dict[str, Any], left: float | None) -> str:
    given, best, smallest = (answer[name] for name in ("given", "best", "smallest"))
    shared = left is not None and left < answer["torch_gib"]
    aside = f" (the driver, NCCL and other processes leave it {left:.1f})" if shared else ""
    planned_at = (
        f"The planner has this command at {given['gib']:.1f} GiB of {planned.limit_of(answer, aside)}, set by "
        + given["phase"]
        + answer["supposed"]
    )
    if best is not None:
        return f"{planned_at}. What fits best, at {best['gib']:.1f}: {_instead(best['flags'])}"
    return (
        f"{planned_at}. None of {answer['settings']} settings fits: try {answer['advice']}. The smallest, at "
        f"{smallest['gib']:.1f}: {_instead(smallest['flags'])}"
    )


def _instead(flags: str) -> str:
    return f"{flags or 'no flags'}, in the place of its tiling flags"

"""What the planner says of the command that this process runs: asked in a process of its own, which sees no GPU.

One rank asks and the others get its answer through the store at which they all met: none of this is a collective, so
that a rank can ask for itself while its peers wait for it in one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_tiling.arguments import AUTOMATIC
from megatron_tiling.config import DEFAULT_FACTOR, argument_of
from megatron_tiling.log import log_on_rank_0

PLANNER = "megatron_tiling.plan.choice"
#: What its answer, a line of JSON, begins with.
ANSWER = "PLANNED "
#: That the planner may take. Peers wait in collectives meanwhile, of which Megatron's time out after ten minutes.
SECONDS = 300
#: By default, of a GPU that is not there.
GPU_MEMORY_GIB = 80.0


class NoPlan(Exception):
    """The planner has no answer; the message says why."""


def gpu_memory_gib() -> float:
    """Of this rank's GPU, as far as this process may have it."""
    if not torch.cuda.is_available():
        return GPU_MEMORY_GIB
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total * torch.cuda.get_per_process_memory_fraction() / 2**30


def command(flags: Sequence[str] = ()) -> list[str]:
    """This process's own, as the planner takes it; ``flags`` go behind the script's."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ["--gpu-memory-gib", f"{gpu_memory_gib():.3f}", "--gpus", str(world), "--", *sys.argv, *flags]


def command_to_run() -> str:
    """For the user's shell."""
    return shlex.join(["python", "-m", "megatron_tiling", "plan", *command()])


def ask(asked: Sequence[str]) -> dict[str, Any]:
    """The planner's answer, of ``plan/choice.py``.

    Raises:
        NoPlan: it ends without one, or takes too long.
    """
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # what this process imports from
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", PLANNER, *asked],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoPlan(f"it took more than {SECONDS} s") from None
    except OSError as error:  # the host may be out of memory too
        raise NoPlan(str(error)) from None
    for line in done.stdout.splitlines():
        if line.startswith(ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
            return answer
    raise NoPlan(next(filter(None, reversed(done.stderr.splitlines())), f"it ended with {done.returncode}"))


def limit_of(answer: dict[str, Any], aside: str = "") -> str:
    """The largest peak that fits, in GiB, with words of the caller's, and what is left beside it."""
    beside = f", beside {answer['fragmentation']}" if answer["fragmentation"] else ""
    return f"{answer['limit_gib']:.1f}{aside}{beside}"


def once_in_a_run(name: str, work: Callable[[], str]) -> str:
    """What ``work`` returns on the rank that comes first. For all others, which wait for it.

    Raises:
        NoPlan: that rank is gone, or its store is.
    """
    if not torch.distributed.is_initialized():
        return work()
    import torch.distributed.distributed_c10d as c10d

    store = c10d._get_default_store()
    try:
        if store.add(f"megatron_tiling/{name}/asked", 1) == 1:
            result = work()
            store.set(f"megatron_tiling/{name}", result)
            return result
        until = time.monotonic() + SECONDS + 60
        while time.monotonic() < until:  # Store.wait would keep the store from NCCL's watchdog
            if store.check([f"megatron_tiling/{name}"]):
                return store.get(f"megatron_tiling/{name}").decode()
            time.sleep(0.5)
    except RuntimeError as error:  # the store's
        raise NoPlan(str(error)) from None
    raise NoPlan("the rank that asked it is gone")


def asks_for_plan(args: Namespace) -> list[str]:
    """Flags whose value the planner is to choose."""
    return [flag for flag in AUTOMATIC if getattr(args, argument_of(flag), None) == "auto"]


def to_check(args: Namespace) -> Namespace:
    """Arguments with values that hold in any model, in the place of those that are to be chosen.

    DeepSpeed's scripts build models past Megatron's trainer, where nobody chooses.
    """
    if getattr(args, "deepspeed_config", None):
        return args
    values = {"--tile-factor": DEFAULT_FACTOR, "--tiled-mlp-keep": 0}
    return Namespace(**vars(args) | {argument_of(flag): values[flag] for flag in asks_for_plan(args)})


def choose(args: Namespace) -> None:
    """Put the planner's choice into ``args``, the same on all ranks, where they ask for it.

    Raises:
        ValueError: on all ranks, if it has none: why, and what to give instead.
    """
    flags = asks_for_plan(args)
    if not flags:
        return
    asked = " ".join(f"{flag} auto" for flag in flags)
    numbers = f"give numbers, such as --tile-factor {DEFAULT_FACTOR} --tiled-mlp-keep all"

    def work() -> str:
        try:
            return json.dumps(ask(command()))
        except NoPlan as none:
            return json.dumps({"refused": str(none)})

    log_on_rank_0(f"{asked}: the planner is asked")
    try:
        answer = json.loads(once_in_a_run("auto", work))
    except NoPlan as none:
        answer = {"refused": str(none)}
    if "refused" in answer:
        raise ValueError(f"{asked}: there is no plan of this command ({answer['refused']}); {numbers}")
    chosen, before, least = (answer[name] for name in ("best", "before", "smallest"))
    if chosen is None:
        raise ValueError(
            f"{asked}: none of {answer['settings']} settings fits into {limit_of(answer, ' GiB')}. The smallest, "
            f"{least['flags']}, needs {least['gib']:.1f}; give it to try it, or see what else fits: {command_to_run()}"
        )
    words = chosen["flags"].split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        setattr(args, argument_of(flag), value if value == "all" else int(value))
    faster = f"the next faster, {before['flags']}, needs {before['gib']:.1f}" if before else "it is the fastest"
    log_on_rank_0(
        f"{asked}: chosen is {chosen['flags']}, which needs {chosen['gib']:.1f} GiB of {limit_of(answer)}, set "
        f"by {chosen['phase']}{answer['supposed']}; {faster}"
    )

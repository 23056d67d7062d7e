"""``--measure``: the planned command is run on this machine's GPUs, dense and tiled, and its plan stands beside it.

Each run is five steps of ``watched.py`` in processes of its own, as are the timings of the GPU (``rates.py``): this
process, in which the planner has changed torch, has no GPU.
"""

from __future__ import annotations

import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tiling.plan.clock import Gpu, shipped_rates
from megatron_tiling.plan.columns import columns
from megatron_tiling.plan.rates import described
from megatron_tiling.plan.run import Run
from megatron_tiling.plan.watched import OUT_OF_MEMORY

MIB = 2**20
WATCHED = "megatron_tiling.plan.watched"
RATES = "megatron_tiling.plan.rates"
#: Seconds that timing a GPU may take; it takes half a minute.
RATES_TIME_OUT = 300
#: Of a run that fails: the end of what it printed before torchrun said so.
TAIL_LINES = 25
_ROWS = (
    "peak", "  planned", "set by", "  planned", "torch reserves", "  planned, about",
    "beside torch: driver, NCCL, other processes", "fullest rank", "milliseconds of a step", "  planned, kernels alone",
)  # fmt: skip
_TORCHRUN_SAYS = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic/.*(?:closing signal|failed \(exitcode)", re.M)
_GPUS = """
import json, torch
found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
properties = [torch.cuda.get_device_properties(index) for index in found]
print(json.dumps([[one.name, one.total_memory / 2**30] for one in properties]))
"""


@dataclass(frozen=True)
class Machine:
    """GPUs that the user's environment shows: the first one's name, the GiB of the smallest."""

    name: str
    gib: float


@dataclass(frozen=True)
class Failed:
    """A run that ended early.

    Args:
        phase: in which it was out of memory; empty if it failed otherwise.
        tail: the end of what it printed.
    """

    phase: str
    tail: str


@dataclass(frozen=True)
class Measured:
    """The last step on its fullest rank.

    Args:
        peak: bytes, ``torch.cuda.max_memory_allocated``.
        reserved: the most of any rank.
        outside: what the GPU's memory holds beside what torch reserves, the most of any rank.
        seconds: of a step, the median of those between the first and the last.
        history: seconds, and bytes that are allocated.
    """

    rank: int
    peak: int
    phase: str
    reserved: int
    outside: int
    seconds: float
    history: Sequence[tuple[float, int]]


def machine(needed: int, environment: Mapping[str, str]) -> Machine:
    """This one.

    Raises:
        SystemExit: it has not as many GPUs as the command needs.
    """
    done = subprocess.run([sys.executable, "-c", _GPUS], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"megatron_tiling plan: --measure: torch finds no GPU here: {_last_line(done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    if len(found) < needed:
        here = f"sees {len(found)}" if found else "sees none"
        raise SystemExit(f"megatron_tiling plan: --measure: the command runs on {_gpus(needed)}; torch {here} here")
    return Machine(found[0][0], min(gib for _, gib in found))


def rates(machine: Machine, needed: int, attention: str, environment: Mapping[str, str]) -> Gpu:
    """As timed now on the GPUs that the command runs on; the shipped ones where that fails. Says which."""
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder, "rates.json"), Path(folder, "log")
        code = _launch(RATES, [str(record), attention], needed, environment, log, RATES_TIME_OUT)
        if code or not record.exists():
            why = f"took more than {RATES_TIME_OUT} s" if code is None else f"failed ({_last_line(tail(log))})"
            instead = "they are by the shipped table, of an H100 where it has no other"
            print(f"times: timing {machine.name} {why}; {instead}", flush=True)
            return shipped_rates(machine.name)
        found = json.loads(record.read_text())
    gpu = Gpu(**found["gpu"])
    words = described(gpu, found["error"], found["attention"], needed)
    print(f"times: by rates of this {machine.name}, timed now: {words}")
    for kept in found["kept"]:
        print(f"  not timed, by the table that ships with this package: {kept}")
    sys.stdout.flush()
    return gpu


def records(
    script: str, arguments: Sequence[str], gpus: int, environment: Mapping[str, str], history: bool = False
) -> list[dict[str, Any]] | Failed:
    """What ``watched`` writes of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder, "record"), Path(folder, "log")
        code = _launch(WATCHED, ["--history"] * history + [str(record), script, *arguments], gpus, environment, log)
        files = [Path(f"{record}.{rank}.json") for rank in range(gpus)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        printed = tail(log)
        if phases := [each[OUT_OF_MEMORY] for each in found if OUT_OF_MEMORY in each]:
            return Failed(phases[0], printed)
        if len(found) < gpus and "CUDA out of memory" in log.read_text(errors="replace"):
            return Failed("a part of the run that is not watched", printed)
        if len(found) < gpus:  # else all is measured, however it ended
            return Failed("", printed or f"it ended with {code}, and without its last step")
        return found


def runs(
    script: str, settings: Mapping[str, Sequence[str]], gpus: int, environment: Mapping[str, str], history: bool
) -> dict[str, Measured | Failed]:
    """The script with the arguments of each setting, one after the other. Says which."""
    found: dict[str, Measured | Failed] = {}
    for name, arguments in settings.items():
        print(f"measuring on {_gpus(gpus)}, {name} ...", flush=True)
        ranks = records(script, arguments, gpus, environment, history)
        found[name] = ranks if isinstance(ranks, Failed) else measured(ranks)
    return found


def measured(ranks: Sequence[Mapping[str, Any]]) -> Measured:
    """Of each rank's record."""
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank]["peak"])
    found = ranks[fullest]
    return Measured(
        fullest, found["peak"], found["phase"],
        reserved=max(each["reserved"] for each in ranks), outside=max(each["outside"] for each in ranks),
        seconds=max(statistics.median(each["seconds"][1:-1]) for each in ranks),
        history=[(seconds, size) for seconds, size in found["history"]],
    )  # fmt: skip


def comparison(planned: Mapping[str, tuple[Run, int, float]], found: Mapping[str, Measured | Failed]) -> str:
    """The table, a column for each run by its name, and how those failed that did not end well.

    Args:
        planned: of each the run on its fullest rank, what torch reserves then, and the seconds of a step.
    """
    cells = zip(*(_cells(planned[name], one) for name, one in found.items()), strict=True)
    rows = [
        ["MiB, measured in the last step", *found],
        *([name, *row] for name, row in zip(_ROWS, cells, strict=True)),
    ]
    text = [columns(rows)]
    for name, one in found.items():
        if isinstance(one, Failed) and one.phase:
            text.append(f"{name}: out of memory in {one.phase}")
        elif isinstance(one, Failed):
            text.append(f"{name}: the measured run failed. The end of what it printed:\n{one.tail}")
    return "\n".join(text)


def _cells(planned: tuple[Run, int, float], found: Measured | Failed) -> list[str]:
    run, reserved, seconds = planned
    expected = f"{run.peak / MIB:.0f}", f"{reserved / MIB:.0f}", f"{1000 * seconds:.1f}"
    if isinstance(found, Failed):
        how = "out of memory" if found.phase else "failed"
        return [how, expected[0], found.phase or "-", run.phase, "-", expected[1], "-", "-", "-", expected[2]]
    return [
        f"{found.peak / MIB:.0f}", f"{expected[0]} ({run.peak / found.peak - 1:+.2%})", found.phase, run.phase,
        f"{found.reserved / MIB:.0f}", f"{expected[1]} ({reserved / found.reserved - 1:+.1%})",
        f"{found.outside / MIB:.0f}", str(found.rank),
        f"{1000 * found.seconds:.1f}", f"{expected[2]} ({seconds / found.seconds - 1:+.1%})",
    ]  # fmt: skip


def tail(log: Path) -> str:
    """The end of what a run printed, without torchrun's own report of it."""
    text = log.read_text(errors="replace")
    own = _TORCHRUN_SAYS.split(text, maxsplit=1)[0].strip() or text.strip()
    return "\n".join(own.splitlines()[-TAIL_LINES:])


def _launch(
    module: str, arguments: Iterable[str], gpus: int, environment: Mapping[str, str], log: Path,
    seconds: float | None = None,
) -> int | None:  # fmt: skip
    """The exit status of a module on so many ranks of this host; ``None`` if it was ended after ``seconds``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = ["--nproc-per-node", str(gpus), "--master-port", str(port)]
    several = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if gpus > 1 else {}  # which Megatron asks for
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", module, *arguments],
            env=several | dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _last_line(text: str) -> str:
    return next(filter(None, reversed(text.splitlines())), "it said nothing")


def _gpus(count: int) -> str:
    return f"{count} GPU" + "s" * (count > 1)

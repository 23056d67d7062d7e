"""Several training runs under one torchrun: Megatron is imported once, and each run is a fork of every rank.

    torchrun --standalone --nproc-per-node N -m tests.support.train_many RUNS.json

RUNS.json: ``[{"name": ..., "log": ..., "argv": [SCRIPT, FLAG...]}, ...]``. A run goes through the runner as
``python -m megatron_tiling SCRIPT FLAG...`` does, its output into ``log``.rank, and counts GEMMs there.
With ``"gathered": true`` it prints what an FSDP held gathered at once, and gradient norms: gathered.py.
With ``"runner": false`` it is ``python SCRIPT FLAG...``: nothing but the script itself can install the plugin.
With ``"check": true`` it is no training but one of the check scripts of this folder.
With ``"kill": {"folder": ..., "operation": N, "delay": SECONDS}`` it is killed while it saves into that folder: see
``kill_while_saving``. ``"argv_of_rank_1"`` replaces ``"argv"`` on that rank.
"""

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_tiling import __main__ as runner
from megatron_tiling import cpu
from megatron_tiling.tiles import gemm, head_memory, wgrad
from megatron_tiling.tiles import linear as functional
from megatron_tiling.tiles import mlp as mlp_tiles
from megatron_tiling.zero3.engine import import_deepspeed


def count_gemms() -> None:
    """Print, as the run ends, how many GEMMs went through the tile loops."""
    stock, counts = gemm.gemm_into, collections.Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> None:
        counts["gemm"] += 1
        stock(*args, **kwargs)

    for module in (functional, wgrad, mlp_tiles, head_memory):
        module.gemm_into = counted
    torch.distributed.destroy_process_group = lambda stop=torch.distributed.destroy_process_group: (
        print(f"GEMMs: {counts['gemm']}"),
        stop(),
    )


def print_gathered() -> None:
    """Print, as the run ends, what was gathered at once."""
    from tests.support import gathered

    most = gathered.watch()
    torch.distributed.destroy_process_group = lambda stop=torch.distributed.destroy_process_group: (
        print(most),
        stop(),
    )


def kill_while_saving(folder: str, operation: int, delay: float = 0) -> None:
    """Send SIGKILL to this rank and its helper processes at its N-th file operation in ``folder`` that writes.

    Negative operations stand for the tracker file: -1 is before it is opened.

    Args:
        folder: where the run saves.
        operation: from 0; read-only opens do not count.
        delay: seconds from the operation to the kill, for moments in the middle of writing.
    """
    os.setpgid(0, 0)
    writes, places = itertools.count(), (folder, os.path.realpath(folder))
    tracker = Path(folder, "latest_checkpointed_iteration.txt")
    tracker_opened = threading.Event()

    def kill() -> None:
        # Megatron truncates the tracker file before it writes it, and stops at an empty one: not a moment to test.
        while tracker_opened.is_set() and not tracker.stat().st_size:
            time.sleep(1e-4)
        os.killpg(0, signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename"):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if not path.startswith(places) or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        opens_tracker = path.endswith(tracker.name)
        if opens_tracker if operation == -1 else next(writes) == operation:
            print(f"killed {delay * 1e3:.1f} ms after {event} {os.path.basename(path)}", flush=True)
            if delay:
                threading.Timer(delay, kill).start()
            else:
                os.killpg(0, signal.SIGKILL)
        if opens_tracker:
            tracker_opened.set()

    sys.addaudithook(watch)


def train(run: dict[str, Any], number: int) -> None:
    """The run of this number, in a forked child of this rank. Never returns.

    All runs meet at torchrun's store: a port chosen before a run starts may be taken by then.
    """
    status = 1
    os.environ |= run.get("env", {})
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # in torch.distributed it is a function
    store_of_torchrun = rendezvous._create_c10d_store
    rendezvous._create_c10d_store = lambda *args, **kwargs: torch.distributed.PrefixStore(
        f"run {number}", store_of_torchrun(*args, **kwargs)
    )
    log = os.open(f"{run['log']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if os.environ["RANK"] == "1":
        run["argv"] = run.get("argv_of_rank_1", run["argv"])
    sys.argv = ["megatron_tiling", *run["argv"]]
    try:
        start(run)
        status = 0
    except SystemExit as ending:
        print(ending)
        status = 0 if ending.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def start(run: dict[str, Any]) -> None:
    if run.get("check"):
        sys.argv = run["argv"]
        runpy.run_path(run["argv"][0], run_name="__main__")
        return
    count_gemms()
    if run.get("gathered"):
        print_gathered()
    if "kill" in run:
        kill_while_saving(**run["kill"])
    if run.get("runner", True):
        runner.main()
    else:
        sys.argv = cpu.with_default_args(run["argv"])
        runpy.run_path(sys.argv[0], run_name="__main__")
        torch.distributed.destroy_process_group()


def do_once(runs: list[dict[str, Any]], data: Path) -> None:
    """What takes each run a second or two: tokenizers to import, arguments' help to read, mock data to shuffle."""
    with contextlib.suppress(ImportError):  # 0.16 has no argument_utils
        importlib.import_module("megatron.core.tokenizers.text")
        arguments = importlib.import_module("megatron.training.argument_utils").ArgumentGroupFactory
        stock, known = arguments._get_field_docstrings, {}

        def read(self: Any, config: type) -> dict[str, str]:
            if config not in known:
                known[config] = stock(self, config)
            return known[config]

        arguments._get_field_docstrings = read
        importlib.import_module("megatron.training.arguments").add_megatron_arguments(argparse.ArgumentParser())
    for run in runs:
        for argv in (run["argv"], run.get("argv_of_rank_1", [])):
            if "--mock-data" in argv:
                argv += ["--data-cache-path", str(data)]


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    cpu.install(train=not all(run.get("check") for run in runs))  # imports Megatron, and its trainer, once
    if os.environ["RANK"] == "0":
        print(f"megatron-core {megatron.core.__version__} of {megatron.core.__file__}", flush=True)
    torch.set_num_threads(1)
    # A run's first save would spawn this helper, which imports the run's script: many seconds.
    if hasattr(filesystem_async, "get_write_results_queue"):  # 0.16 has none, and its runs here save nothing
        filesystem_async.get_write_results_queue("fork")
    do_once(runs, Path(sys.argv[1]).with_suffix(".data"))
    if any("--deepspeed-config" in run["argv"] for run in runs):
        import_deepspeed()
    for number, run in enumerate(runs):
        child = os.fork()
        if child == 0:
            train(run, number)
        _, status = os.waitpid(child, 0)
        if os.environ["RANK"] == "0":
            print(f"{run['name']}: exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()

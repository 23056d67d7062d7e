"""Several training runs under one torchrun: Megatron is imported once, and each run is a fork of every rank.

    torchrun --standalone --nproc-per-node N tests/distributed/train_many.py RUNS.json

RUNS.json: ``[{"name": ..., "port": ..., "log": ..., "argv": [SCRIPT, FLAG...]}, ...]``. A run goes through the
runner as ``python -m megatron_tiling SCRIPT FLAG...`` does, its output into ``log``.rank, and counts GEMMs there.
With ``"runner": false`` it is ``python SCRIPT FLAG...``: nothing but the script itself can install the plugin.
"""

import collections
import contextlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_tiling import __main__ as runner
from megatron_tiling import cpu, cross_entropy, functional, gemm, mlp_loop, wgrad


def count_gemms() -> None:
    """Print, as the run ends, how many GEMMs went through the tile loops."""
    stock, counts = gemm.gemm_into, collections.Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> None:
        counts["gemm"] += 1
        stock(*args, **kwargs)

    for module in (functional, wgrad, mlp_loop, cross_entropy):
        module.gemm_into = counted
    torch.distributed.destroy_process_group = lambda stop=torch.distributed.destroy_process_group: (
        print(f"GEMMs: {counts['gemm']}"),
        stop(),
    )


def train(run: dict[str, Any]) -> None:
    """One run, in a forked child of this rank. Never returns."""
    status = 1
    os.environ |= {"MASTER_PORT": str(run["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"} | run.get("env", {})
    log = os.open(f"{run['log']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["megatron_tiling", *run["argv"]]
    try:
        count_gemms()
        if run.get("runner", True):
            runner.main()
        else:
            sys.argv = cpu.with_default_args(run["argv"])
            runpy.run_path(sys.argv[0], run_name="__main__")
            torch.distributed.destroy_process_group()
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


def main() -> None:
    cpu.install()  # imports Megatron's trainer, once
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            train(run)
        _, status = os.waitpid(child, 0)
        if os.environ["RANK"] == "0":
            print(f"{run['name']}: exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()

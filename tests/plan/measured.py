"""Two of the training steps of benchmarks/end_to_end.py, measured on a GPU and planned without one.

python -m tests.plan.measured
"""

import functools
import os
import tempfile

from benchmarks.end_to_end import BODY, MODEL, PLAIN
from megatron_tiling.plan.processes import in_processes
from megatron_tiling.plan.run import plan, prepare

SCRIPT = "examples/gpt/pretrain_gpt.py"
#: MiB of the run -> flags. Fusion changes neither the memory of dense nor its products.
MEASURED = {40463: PLAIN, 38783: f"{BODY} --tiled-mlp-keep 0"}


def main() -> None:
    tracker = prepare()
    with tempfile.TemporaryDirectory() as save:
        writing = ["--save", save, "--save-interval", "1", "--log-progress"]
        arguments = [*MODEL, "--train-iters", "14", "--vocab-size", "31999", *writing]
        jobs = [
            functools.partial(plan, tracker, SCRIPT, [*arguments, *flags.split()], world=1, rank=0)
            for flags in MEASURED.values()
        ]
        runs = in_processes(jobs)
        if os.listdir(save):
            raise SystemExit(f"a plan has written {os.listdir(save)}")
    for measured, run in zip(MEASURED, runs, strict=True):
        if isinstance(run, str):
            raise SystemExit(run)
        print(f"MEASURED {measured} planned {run.peak >> 20}, {run.phase}; {run.flops / 1e12:.2f} TFLOP")


if __name__ == "__main__":
    main()

"""Run an unmodified Megatron-LM script with tiled linear layers.

torchrun ... -m megatron_tiling pretrain_gpt.py --use-tiled-linear ARGS

Or say what such a run will need, without a GPU (see ``plan/``):

python -m megatron_tiling plan pretrain_gpt.py --use-tiled-linear ARGS
"""

import argparse
import os
import sys

from megatron_tiling import runner
from megatron_tiling.arguments import add_tiling_args

USAGE = "python -m megatron_tiling [plan] SCRIPT [ARGS of the script, and those below]"


def main() -> None:
    """Install the plugin, then run the script as ``__main__``."""
    parser = add_tiling_args(argparse.ArgumentParser(usage=USAGE, description="Run a Megatron-LM script, tiled."))
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if script == "plan":
        environment = dict(os.environ)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
        from megatron_tiling.plan.command import main as plan

        return plan(environment)
    if script.startswith("-"):
        parser.error(f"{script} stands before the script: first SCRIPT, then its flags and those of this package")
    if reason := runner.reason_in_script(script):
        parser.error(reason)
    sys.argv = sys.argv[1:]
    runner.prepare(script)
    runner.run(script)


if __name__ == "__main__":
    main()

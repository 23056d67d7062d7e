"""Run an unmodified Megatron-LM script with tiled linear layers.

torchrun ... -m megatron_tiling pretrain_gpt.py --use-tiled-linear ARGS
"""

import argparse
import os
import runpy
import sys

from megatron_tiling.arguments import add_tiling_args

USAGE = "python -m megatron_tiling SCRIPT [ARGS of the script, and those below]"


def main() -> None:
    """Install the plugin, then run the script as ``__main__``."""
    parser = add_tiling_args(argparse.ArgumentParser(usage=USAGE, description="Run a Megatron-LM script, tiled."))
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        parser.error(f"there is no script {script}")
    sys.argv = sys.argv[1:]
    # As for `python SCRIPT`, and before Megatron is imported: a script in a Megatron-LM tree uses that tree.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))

    import torch

    if not torch.cuda.is_available():
        from megatron_tiling import cpu

        if os.environ.get("RANK", "0") == "0":
            print("megatron_tiling: no GPU here; Megatron runs on the CPU over gloo, for trying things out", flush=True)
        cpu.install()
        sys.argv = cpu.with_default_args(sys.argv)

    from megatron_tiling.trainer.hook import install

    install()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # scripts leave this to process exit, where gloo's threads now and then abort
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""A user's script, run as ``__main__`` with the plugin in its Megatron."""

import os
import runpy
import sys
from typing import NoReturn

#: What is given by mistake in the place of a script.
LAUNCHERS = {"torchrun", "python", "python3", "bash", "sh", "srun", "mpirun", "deepspeed"}


def reason_in_script(script: str) -> str:
    """Why this cannot be run as a Python script, or nothing."""
    instead = "; give the Python script that it starts, and the arguments of that"
    if not os.path.isfile(script):
        return f"there is no script {script}" + instead * (script in LAUNCHERS)
    with open(script, "rb") as file:
        first = file.readline()
    shebang = first.split() if first.startswith(b"#!") else ()
    of_a_shell = script.endswith(".sh") or any(word.endswith(b"sh") for word in shebang)
    return f"{script} is not a Python script{instead}" if of_a_shell else ""


def prepare(script: str) -> None:
    """What stands before a script: its folder on the path, the CPU where there is no GPU, and the plugin."""
    # As for `python SCRIPT`, and before Megatron is imported: a script in a Megatron-LM tree uses that tree.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))

    import torch

    if not torch.cuda.is_available():
        from megatron_tiling import cpu
        from megatron_tiling.log import log_on_rank_0

        log_on_rank_0("no GPU here; Megatron runs on the CPU over gloo, for trying things out")
        cpu.install()
        sys.argv = cpu.with_default_args(sys.argv)

    from megatron_tiling.trainer.install import install

    install()


def run(script: str) -> None:
    """Run a script as ``__main__``. One that fails ends this process, its traceback printed."""
    import torch

    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException as error:
        failed = not isinstance(error, SystemExit) or error.code not in (None, 0)
        if failed and torch.distributed.is_initialized():
            _leave(error)
        raise
    finally:  # scripts leave this to process exit, where gloo's threads now and then abort
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _leave(error: BaseException) -> NoReturn:
    """Say what failed and end: process groups, on Python's way out, would wait for peers that wait for this rank."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)

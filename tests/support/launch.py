"""Start a script under torchrun, as a user would."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TRAIN_MANY = Path(__file__).with_name("train_many.py")
EXAMPLES = ROOT / "examples" / "gpt"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONFAULTHANDLER": "1",
}
TIMEOUT = 900
"""Seconds."""


def search_path(*folders: Path | str) -> str:
    """For PYTHONPATH: modules from the folders first, then the checkout's (``tests.``, the examples), then as usual."""
    given = filter(None, [os.environ.get("PYTHONPATH")])
    return os.pathsep.join(map(str, (*folders, ROOT, EXAMPLES, *given)))


def torchrun(
    *command: str | Path, world: int, fails: bool = False, environment: Mapping[str, str] | None = None
) -> str:
    """Output of ``torchrun COMMAND`` on ``world`` processes; an AssertionError with its end if it does not end well.

    Args:
        command: a script and its arguments, or ``"-m", MODULE, ARGUMENT...``.
        fails: a non-zero exit is what is wanted.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    # Files, not pipes: when ranks are killed, a process that Megatron's checkpoint writer started holds a pipe open.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*launcher, *map(str, command)],
            stdout=stdout,
            stderr=stderr,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": search_path()} | dict(environment or {}),
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
            for rank in psutil.Process(process.pid).children(recursive=True):
                rank.send_signal(signal.SIGABRT)  # it prints where it waits
            process.wait(60)
        stdout.seek(0)
        stderr.seek(0)
        output = stdout.read() + stderr.read()
    assert code is not None, f"not done after {TIMEOUT} seconds\n{output[-6000:]}"
    assert (code != 0) == fails, output[-6000:]
    return output


def empty_driver(folder: Path) -> Path:
    """``folder``, with an empty libcuda.so.1 in it, which TransformerEngine wants to load where there is no driver."""
    (folder / "empty.c").write_text("int nothing;")
    library = [folder / "libcuda.so.1", folder / "empty.c"]
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", *library], check=True)
    return folder

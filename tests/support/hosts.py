"""torchrun on one host, or on several that this one plays, which then share its GPUs.

NCCL takes two ranks on one GPU for a mistake, unless they say that they are on different hosts. Between those it sends
through sockets, here of the loopback device: slow, so that losses and memory can be measured, and times cannot.
"""

import math
import os
import socket
import subprocess
import sys
import time
from typing import IO

from tests.support.launch import search_path

OUT_OF_TIME = 124
"""Exit status of a run that was ended, as that of ``timeout``."""


def torchrun(
    command: list[str],
    world: int,
    environment: dict[str, str],
    hosts: int = 1,
    output: IO[str] | None = None,
    seconds: float = math.inf,
) -> int:
    """Run a script and its arguments on ``world`` processes. Returns an exit status, not 0 if any of them failed.

    Args:
        environment: added to this process's own.
        hosts: a divisor of ``world``.
        output: where standard output and errors of all processes go; by default, where this process's go.
        seconds: a run that takes longer is ended.

    Raises:
        SystemExit: ``hosts`` does not divide ``world``.
    """
    if world % hosts:
        raise SystemExit(f"--hosts {hosts} does not divide the {world} processes of a layout")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    for host in range(hosts):
        rendezvous = ["--nnodes", str(hosts), "--node-rank", str(host), "--nproc-per-node", str(world // hosts)]
        rendezvous += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        apart = {"NCCL_HOSTID": f"host{host}", "NCCL_SOCKET_IFNAME": "lo"} if hosts > 1 else {}
        launchers.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *rendezvous, *command],
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=os.environ | {"PYTHONPATH": search_path()} | environment | apart,
            )
        )
    deadline = time.monotonic() + seconds
    while True:
        statuses = [launcher.poll() for launcher in launchers]
        failed = next((status for status in statuses if status), 0)
        if failed or None not in statuses or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for launcher in launchers:  # the other hosts would wait for one that failed
        launcher.terminate()
    for launcher in launchers:
        launcher.wait()
    return OUT_OF_TIME if None in statuses and not failed else failed

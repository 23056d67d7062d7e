"""An offload that the host cannot hold is refused before the operating system ends the process without a word."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def require_host_memory(config: Mapping[str, Any], elements: int, element_size: int) -> None:
    """Compare what the ranks of this machine will offload to it with what it has left.

    Args:
        config: DeepSpeed's.
        elements: parameters of the rank's partition.
        element_size: bytes of a parameter as the model holds it.

    Raises:
        ValueError: with bytes asked for, by setting, and bytes available.
    """
    zero = config["zero_optimization"]
    parameter, optimizer = (zero.get(name) or {} for name in ("offload_param", "offload_optimizer"))
    needs = {}
    if parameter.get("device") == "cpu":
        needs["offload_param"] = elements * element_size
    if optimizer.get("device") == "cpu":  # float32: master weight, gradient, two moments
        needs["offload_optimizer"] = int(elements * 16 * optimizer.get("ratio", 1.0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total, available = sum(needs.values()) * ranks, available_host_memory()
    if total > available:
        parts = ", ".join(f"{name}.device cpu {_gib(bytes_)}" for name, bytes_ in needs.items())
        raise ValueError(
            f"offload to host memory needs {_gib(total)} on this machine ({ranks} ranks x ({parts})), and "
            f"{_gib(available)} are available; offload less, to nvme, or spread the run over more machines"
        )


def available_host_memory() -> int:
    """Bytes that processes of this container can still allocate: the kernel's estimate, or the cgroup's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and (bound := Path(limit).read_text().strip()) != "max":
            available = min(available, int(bound) - int(Path(used).read_text()))
    return available


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB ({size} bytes)"

"""Where a result comes from: its date, command, machine and versions, and the head of its page."""

import datetime
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def installed(package: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(several: bool = False) -> str:
    """The GPU by its name, with how many there are if ``several`` take part; or that there is none."""
    import torch

    if not torch.cuda.is_available():
        return "CPU, gloo"
    return f"{torch.cuda.device_count()}x " * several + torch.cuda.get_device_name()


def kernel_lines(title: str, kernels: Iterable[tuple[str, int, float]]) -> list[str]:
    """A table of kernels: name, calls and milliseconds of each."""
    rows = [f"| `{name[:90]}` | {calls} | {milliseconds:.3f} |" for name, calls, milliseconds in kernels]
    return ["", f"{title}:", "", "| kernel | calls | ms |", "|---|---|---|", *rows]


def command(options: str | None = None) -> str:
    """This process's command.

    Args:
        options: in place of those that were given, for a script that spells out its defaults.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node {processes}"
    given = shlex.join(sys.argv[1:]) if options is None else options
    return f"{launcher} -m benchmarks.{Path(sys.argv[0]).stem} {given}".rstrip()


@dataclass(frozen=True)
class Origin:
    """What a page of results begins with. Records that are kept as JSON hold these fields too."""

    date: str
    command: str
    machine: str
    versions: dict[str, str]

    @classmethod
    def now(cls, packages: Iterable[str], machine: str, options: str | None = None) -> "Origin":
        versions = {package: installed(package) for package in packages}
        return cls(datetime.date.today().isoformat(), command(options), machine, versions)

    def head(self, title: str, setting: str = "") -> list[str]:
        """Lines of Markdown, the last one empty.

        Args:
            title: what was measured.
            setting: what is to be known of the machine besides, in a few words.
        """
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = ", ".join(filter(None, (self.machine, setting)))
        made = "; ".join(filter(None, (where, versions)))
        return [f"# {title}, {self.date}", "", f"{made}. Command:", "", f"    {self.command}", ""]

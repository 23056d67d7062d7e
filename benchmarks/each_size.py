"""What benchmarks of one MLP share: their options, and a process of its own for every size."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import output_folder, positive
from benchmarks.record import RESULTS, Origin


def measured(
    doc: str | None, packages: tuple[str, ...], repeats: int, run_size: Callable[[int, int, int, int], dict[str, Any]]
) -> tuple[argparse.Namespace, Origin, list[dict[str, Any]]]:
    """What ``run_size(hidden_size, ffn_hidden_size, tokens, repeats)`` measures of each size that is asked for.

    Args:
        doc: of the command.
        packages: whose versions are recorded.
        repeats: the option's default.
        run_size: what it returns goes through JSON, and names the ``gpu``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4096x14336", "8192x28672"], help="hidden x ffn_hidden")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--one-size-into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_size_into:
        hidden_size, ffn_hidden_size = map(int, args.sizes[0].split("x"))
        run = run_size(hidden_size, ffn_hidden_size, args.tokens, args.repeats)
        args.one_size_into.write_text(json.dumps(run))
        sys.exit()
    common = f"--tokens {args.tokens} --repeats {args.repeats}"
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            command = [sys.executable, "-m", f"benchmarks.{Path(sys.argv[0]).stem}", "--sizes", size, *common.split()]
            subprocess.run([*command, "--one-size-into", f"{folder}/{size}"], check=True)
            runs.append(json.loads(Path(folder, size).read_text()))
    return args, Origin.now(packages, runs[0]["gpu"], f"--sizes {' '.join(args.sizes)} {common}"), runs

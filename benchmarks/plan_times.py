"""The planner's time of kernels beside steps that were measured: the page of 2026-11-27-planner-times.

    python -m benchmarks.plan_times [--records NAME ...]

Of every row of a record that has a time, its ratio to the first row of its table, predicted with the rates of the GPU
that it ran on, and measured. Attention of some records computed nothing (their pages say so), so that the planner's
takes no time there either.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.plan_accuracy import KINDS, Planner
from benchmarks.record import RESULTS
from megatron_tiling.plan.clock import GPUS

WITHOUT_ATTENTION = (
    "2026-11-26-whole-model-flash",
    "2026-11-27-whole-model-flash-8-layers",
    "2026-11-27-longest-context-3b",
    "2026-11-27-longest-context-3b-full-recompute",
)
RECORDS = (
    *WITHOUT_ATTENTION,
    "2026-11-27-mlp-te",
    "2026-11-27-whole-model-h200",
    "2026-11-27-whole-model-h200-8-layers",
    "2026-11-27-longest-context-3b-h200",
    "2026-11-27-experts-h200",
)
#: Ratios that differ by less are not looked at for their order.
APART = 1.03


@dataclasses.dataclass(frozen=True)
class Timed:
    """Milliseconds of a step."""

    name: str
    predicted: float
    measured: float


def tables(rows: Iterable[Timed]) -> dict[str, list[Timed]]:
    """Rows that may be compared: of one shape, or of as many tokens, which their names begin or end with."""
    found: dict[str, list[Timed]] = {}
    for row in rows:
        shape = re.search(r"^h=\d+|^\d+:\d+:\d+|\d+ tokens$", row.name)
        found.setdefault(shape[0] if shape else "", []).append(row)
    return {shape: of_shape for shape, of_shape in found.items() if len(of_shape) > 1}


def errors(rows: Sequence[Timed]) -> list[float]:
    """Of each ratio but the first row's, which is 1."""
    first = rows[0]
    return [(row.predicted / first.predicted) / (row.measured / first.measured) - 1 for row in rows[1:]]


def misordered(rows: Sequence[Timed]) -> tuple[int, int]:
    """Pairs that are measured apart, and those among them that are predicted the other way round."""
    pairs = [sorted(pair, key=lambda row: row.measured) for pair in itertools.combinations(rows, 2)]
    apart = [(fast, slow) for fast, slow in pairs if slow.measured > APART * fast.measured]
    return len(apart), sum(fast.predicted > slow.predicted for fast, slow in apart)


def summary(record: str, of_record: Iterable[Sequence[Timed]]) -> str:
    """A row of the page's first table."""
    found = [abs(error) for rows in of_record for error in errors(rows)]
    apart, wrong = (sum(counts) for counts in zip(*map(misordered, of_record), strict=True))
    return f"| {record} | {len(found)} | {statistics.median(found):.1%} | {max(found):.1%} | {apart} | {wrong} |"


def table(title: str, rows: Sequence[Timed]) -> list[str]:
    """Each row against the first."""
    lines = ["", f"## {title}", "", "| | predicted ms | measured ms | predicted | measured | error |", "|---" * 6 + "|"]
    for row, error in zip(rows, [0.0, *errors(rows)], strict=True):
        ratios = f"{row.predicted / rows[0].predicted:.3f} | {row.measured / rows[0].measured:.3f}"
        lines.append(f"| {row.name} | {row.predicted:.1f} | {row.measured:.1f} | {ratios} | {error:+.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", default=RECORDS, metavar="NAME")
    args = parser.parse_args()
    planner = Planner()
    head = [
        "| record | ratios | error, median | largest | pairs apart by 3% | of them in wrong order |",
        "|---" * 6 + "|",
    ]
    body: list[str] = []
    for record in args.records:
        kind = next(kind for part, kind in KINDS.items() if part in record)
        found = json.loads((RESULTS / f"{record}.json").read_text())
        gpu = next(rates for name, rates in GPUS.items() if name in found["origin"]["machine"])
        if record in WITHOUT_ATTENTION:
            gpu = dataclasses.replace(gpu, attention=math.inf, attention_backward=math.inf)
        planner.clock.gpu = gpu
        rows = [
            Timed(name, planner.milliseconds, measured)
            for name, _, _, measured in kind(planner, found, 1)
            if measured is not None
        ]
        of_record = tables(rows)
        head.append(summary(record, of_record.values()))
        for shape, of_shape in of_record.items():
            body += table(f"{record}, {shape}".rstrip(", "), of_shape)
    print("\n".join([*head, *body]))


if __name__ == "__main__":
    main()

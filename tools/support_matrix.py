#!/usr/bin/env python3
"""Write docs/support-matrix.md, the table of what runs where, from what the tests ran, or check that it says so.

    tools/support_matrix.py OUTCOMES...            write the table; of several files, what ran counts
    tools/support_matrix.py --check OUTCOMES...    fail where the page says otherwise than these tests

`--page integrations` is about the table of docs/integrations.md.

OUTCOMES are files of `pytest --feature-outcomes FILE` (tests/support/feature_outcomes.py). What has run on
GPUs is recorded in benchmarks/results/, and always read: *-gpu-tests.json, such a file of the tests on a GPU, and
*-gpu-runs.json, which names the dated result that each cell is from.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = "support-matrix"
GPU_RUNS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- support matrix: written by tools/support_matrix.py -->\n", "<!-- end of the support matrix -->\n"
#: Of several files, the first of these counts.
BEST_FIRST = ("failed", "run", "refused", "not run")

Cells = dict[tuple[str, str], str]


def read(files: list[Path], page: str = PAGE) -> Cells:
    """``{(feature, column): outcome}`` of a page, in the order of tests; a column is a minor version, or ``GPU``."""
    cells: Cells = {}
    for file in files:
        records: list[dict[str, Any]] = json.loads(file.read_text())
        for record in records:
            if record.get("page", PAGE) != page:
                continue
            minor = ".".join(record["version"].split(".")[:2])
            key = (record["feature"], "GPU" if record["device"] == "GPU" else minor)
            outcome = record["outcome"]
            if "source" in record:
                outcome = f"[{outcome}](../benchmarks/results/{record['source']})"
            cells[key] = min(cells.get(key, outcome), outcome, key=rank)
    return cells


def rank(outcome: str) -> int:
    return BEST_FIRST.index(outcome.strip("[").partition("]")[0])


def table(cells: Cells) -> str:
    """A row a feature and a column a version; what is refused by name follows in one sentence."""
    columns = sorted({column for _, column in cells})
    refused = {feature for (feature, _), outcome in cells.items() if outcome == "refused"}
    features = [feature for feature in dict.fromkeys(feature for feature, _ in cells) if feature not in refused]
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[feature, *(cells.get((feature, column), "") for column in columns)] for feature in features]
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    if refused:
        lines.append(f"\nNot supported, and refused by name: {', '.join(sorted(refused))}.\n")
    return "".join(lines)


def contradictions(page: str, cells: Cells) -> list[str]:
    """Where the page's table and these outcomes differ; what these tests had to skip is left out."""
    stated = parse(page)
    found = [
        f"{feature}, {column}: {outcome}, but the page says {stated.get((feature, column)) or 'nothing'}"
        for (feature, column), outcome in cells.items()
        if stated.get((feature, column), "") != outcome
        and not (outcome == "not run" and (feature, column) in stated)
        and not (outcome == "refused" and (feature, "") in stated)
    ]
    known = {feature for feature, _ in cells}
    return found + [f"{feature}: no test shows it" for feature in sorted({name for name, _ in stated} - known)]


def parse(page: str) -> Cells:
    """The cells that the page states, empty ones left out; what it calls refused is in a column ``""``."""
    section = page.partition(BEGIN)[2].partition(END)[0]
    stated: Cells = {}
    columns: list[str] = []
    for line in section.splitlines():
        if line.startswith("|"):
            name, *values = (cell.strip() for cell in line.strip("|").split("|"))
            if not columns:
                columns = values
            elif name != "---":
                stated |= {(name, column): value for column, value in zip(columns, values, strict=True) if value}
        elif "refused by name:" in line:
            names = line.partition("by name: ")[2].rstrip(".").split(", ")
            stated |= {(name, ""): "refused" for name in names}
    return stated


def main() -> int:
    parser = argparse.ArgumentParser(description="The table of what runs where.")
    parser.add_argument("outcomes", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--page", default=PAGE, help="name of a file in docs")
    options = parser.parse_args()
    cells = read([*options.outcomes, *sorted(GPU_RUNS.glob("*-gpu-*.json"))], options.page)
    file = ROOT / "docs" / f"{options.page}.md"
    page = file.read_text()
    if BEGIN not in page or END not in page:
        print(f"support_matrix: {file.name} lacks the line {(BEGIN if BEGIN not in page else END).strip()}")
        return 1
    if options.check:
        found = contradictions(page, cells)
        for line in found:
            print(f"support_matrix: {line}")
        if found:
            again = f"tools/support_matrix.py --page {options.page}"
            print(f"support_matrix: write the table anew with {again}", *options.outcomes)
        return 1 if found else 0
    before, _, rest = page.partition(BEGIN)
    file.write_text(before + BEGIN + table(cells) + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())

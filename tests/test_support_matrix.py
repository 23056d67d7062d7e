"""The page of what runs where: written from outcomes, and checked against them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT, search_path

PLUGIN = "tests.support.feature_outcomes"
tool = runpy.run_path(str(ROOT / "tools" / "support_matrix.py"))


def record(feature: str, version: str, outcome: str, device: str = "CPU", **more: str) -> dict[str, str]:
    return {"feature": feature, "version": version, "outcome": outcome, "device": device} | more


RECORDS = [
    record("layers", "0.19.2", "run"),
    record("layers", "0.16.1", "run"),
    record("training", "0.16.1", "not run"),
    record("training", "0.19.2", "run"),
    record("training", "0.19.2", "run", "GPU", source="a.md"),
    record("`--flag`", "0.19.2", "refused"),
]


def cells(tmp_path: Path, *records: dict[str, str]) -> Any:
    (tmp_path / "outcomes.json").write_text(json.dumps(records))
    return tool["read"]([tmp_path / "outcomes.json"])


def page(table: str) -> str:
    return f"before\n{tool['BEGIN']}{table}{tool['END']}after\n"


def test_table(tmp_path: Path) -> None:
    assert tool["table"](cells(tmp_path, *RECORDS)).splitlines() == [
        "|  | 0.16 | 0.19 | GPU |",
        "| --- | --- | --- | --- |",
        "| layers | run | run |  |",
        "| training | not run | run | [run](../benchmarks/results/a.md) |",
        "",
        "Not supported, and refused by name: `--flag`.",
    ]


def test_a_table_agrees_with_what_it_was_written_from(tmp_path: Path) -> None:
    found = cells(tmp_path, *RECORDS)
    assert tool["contradictions"](page(tool["table"](found)), found) == []


def test_what_was_skipped_here_may_have_run_elsewhere(tmp_path: Path) -> None:
    full = cells(tmp_path, *RECORDS, record("training", "0.16.1", "run"))
    assert full["training", "0.16"] == "run"
    assert tool["contradictions"](page(tool["table"](full)), cells(tmp_path, *RECORDS)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (record("layers", "0.16.1", "failed"), "layers, 0.16: failed, but the page says run"),
        (record("training", "0.16.1", "run"), "training, 0.16: run, but the page says not run"),
        (record("experts", "0.19.2", "run"), "experts, 0.19: run, but the page says nothing"),
        (record("`--other`", "0.19.2", "refused"), "`--other`, 0.19: refused, but the page says nothing"),
    ],
)
def test_a_stale_table_is_found(tmp_path: Path, change: dict[str, str], words: str) -> None:
    stale = page(tool["table"](cells(tmp_path, *RECORDS)))
    assert tool["contradictions"](stale, cells(tmp_path, *RECORDS, change)) == [words]


def test_each_page_has_its_own_features(tmp_path: Path) -> None:
    (tmp_path / "outcomes.json").write_text(
        json.dumps([*RECORDS, record("LoRA", "0.19.2", "run", page="integrations")])
    )
    assert tool["read"]([tmp_path / "outcomes.json"], "integrations") == {("LoRA", "0.19"): "run"}
    assert tool["read"]([tmp_path / "outcomes.json"]) == cells(tmp_path, *RECORDS)


def test_a_row_that_no_test_shows_is_found(tmp_path: Path) -> None:
    stale = page(tool["table"](cells(tmp_path, *RECORDS, record("magic", "0.19.2", "run"))))
    assert tool["contradictions"](stale, cells(tmp_path, *RECORDS)) == ["magic: no test shows it"]


def test_outcomes_of_tests(tmp_path: Path) -> None:
    """The worst of several tests counts; a skipped one only where no other has run."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "feature = pytest.mark.feature\n"
        "@feature('sums of {a}', version='{a}.1.0')\n"
        "@pytest.mark.parametrize('a', [1, 2])\n"
        "@pytest.mark.parametrize('b', [1, 2, 3])\n"
        "def test_sum(a, b):\n"
        "    if b == 3: pytest.skip()\n"
        "    assert a == 1 or b == 1\n"
        "@feature('`--flag`', version='1.0', refused=True)\n"
        "def test_refused(): pass\n"
        "@feature('skipped', version='1.0')\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, "--feature-outcomes", "out.json", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": search_path()},
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["feature"], entry["version"], entry["outcome"]) for entry in found] == [
        ("sums of 1", "1.1.0", "run"),
        ("sums of 2", "2.1.0", "failed"),
        ("`--flag`", "1.0", "refused"),
        ("skipped", "1.0", "not run"),
    ]
    assert {entry["device"] for entry in found} == {"CPU"}


@pytest.mark.parametrize(("page", "rows"), [("support-matrix", 100), ("integrations", 10)])
def test_the_page_has_a_table(page: str, rows: int) -> None:
    assert len(tool["parse"]((ROOT / "docs" / f"{page}.md").read_text())) >= rows

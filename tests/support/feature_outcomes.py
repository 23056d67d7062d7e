"""What ran, by feature and Megatron version, for docs/support-matrix.md: `pytest --feature-outcomes FILE`.

A test says what it shows with `@pytest.mark.feature("name", version=..., refused=...)`. Name and version may hold
parameters of the test in braces: `"training: {layout.name}"`. The version is that of the installed megatron-core unless
it is given. With `refused=True`, the test shows that the feature is refused by name. `page="integrations"` is for the
table of docs/integrations.md. `tools/support_matrix.py` reads the file.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

#: Of several tests that show one feature, the worst decides; one that was skipped only where no other has run.
WORST_FIRST = ("failed", "refused", "run", "not run")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--feature-outcomes", metavar="FILE", help="write what ran to FILE, by feature and version")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "feature(name, version=None, refused=False, page=...): what a test shows to work"
    )
    if config.getoption("--feature-outcomes") and not hasattr(config, "workerinput"):  # no worker of pytest-xdist
        config.pluginmanager.register(_Recorder(Path(config.getoption("--feature-outcomes"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for position, item in enumerate(items):
        for marker in item.iter_markers("feature"):
            item.user_properties.append(("feature", _record(item, marker, position)))


def _record(item: pytest.Item, marker: pytest.Mark, position: int) -> dict[str, Any]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    version = marker.kwargs.get("version") or importlib.metadata.version("megatron-core")
    return {
        "place": [item.path.name, position],
        "feature": marker.args[0].format(**parameters),
        "version": version.format(**parameters),
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "refused": marker.kwargs.get("refused", False),
        "page": marker.kwargs.get("page", "support-matrix"),
    }


class _Recorder:
    """Collects the reports of all tests, of pytest-xdist's workers too, and writes the file at the end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[tuple[str, str], dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = {"skipped": "not run", "passed": "run"}.get(report.outcome, "failed")
        for name, value in report.user_properties:
            if name == "feature":
                record = dict(value)
                if record.pop("refused") and outcome == "run":
                    outcome = "refused"
                key = record["feature"], record["version"]
                known = self.records.setdefault(key, record | {"outcome": outcome})
                known["place"] = min(known["place"], record["place"])
                known["outcome"] = min(known["outcome"], outcome, key=WORST_FIRST.index)

    def pytest_sessionfinish(self) -> None:
        records = sorted(self.records.values(), key=lambda record: record.pop("place"))
        self.file.write_text(json.dumps(records, indent=1) + "\n")

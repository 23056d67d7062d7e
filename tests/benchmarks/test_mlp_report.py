"""The page and the picture of the MLP benchmark, from its record."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.text import Annotation, Text

from benchmarks.mlp_report import markdown, plot
from tests.support.launch import ROOT

RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*-mlp.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_page_is_what_the_record_holds(path: Path) -> None:
    assert path.with_suffix(".md").read_text() == markdown(json.loads(path.read_text()), path.stem)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_names_do_not_lie_over_each_other(path: Path) -> None:
    figure = plot(json.loads(path.read_text()))
    for panel in figure.axes:
        notes = [child for child in panel.get_children() if isinstance(child, Annotation)]
        boxes = [(note.get_text(), Text.get_window_extent(note)) for note in notes]
        assert len(boxes) > 10
        assert [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)] == []

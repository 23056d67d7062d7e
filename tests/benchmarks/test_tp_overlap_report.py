"""The page and the picture of ``benchmarks/tp_overlap.py``'s record."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import Origin
from benchmarks.tp_overlap_report import DENSE, DENSE_STILL, joined, kind, write


def record(**changes: object) -> dict[str, Any]:
    rows = [
        {"name": name, "peak_mib": 100.0, "held_mib": held, "milliseconds": [ms, ms, ms + 0.1], "differences": found}
        | ({"host_milliseconds": [4.0, 5.0, 4.5]} if found else {})  # records of before have none
        for name, ms, held, found in (
            (DENSE, 14.0, 0.0, {"output": 0.0, "hidden": 0.0}),
            (DENSE_STILL, 13.0, 0.0, {}),
            ("ours, 4 steps", 13.25, 64.0, {"output": 1e-3, "hidden": 2e-3, "fc1": 3e-3}),
        )
    ]
    traces = {DENSE: [("nvjet_tst", 7, 0.0, 50.0), ("ncclDevKernel_AllGather", 20, 50.0, 9.0)]}
    run = {"shape": [8192, 28672], "tokens": 8192, "rows": rows, "traces": traces}
    run["left_out"] = {"torch's fused ops": "RuntimeError: no symmetric memory"}
    origin = asdict(Origin("2026-11-27", "a command", "4x a GPU", {"torch": "2.11"}))
    return {"origin": origin, "tp": 4, "repeats": 3, "transport": "symmetric memory", "runs": [run]} | changes


def test_page_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record()))
    page = write(path)
    assert path.with_suffix(".md").read_text() == page
    assert "| ours, 4 steps | 13.25 (13.25 to 13.35) | 0.946 | 0.25 | 4.50 | 100 | 64 | 1.0e-03 | 3.0e-03 |" in page
    assert "Dense's exposed communication: 1.00 ms, 7.1% of it." in page and "(record.png)" in page
    assert f"| {DENSE_STILL} | 13.00 (13.00 to 13.10) | 0.929 | 0.00 |  | 100 | 0 | | |" in page
    assert "Left out: torch's fused ops: `RuntimeError: no symmetric memory`" in page
    assert "# Communication beside an MLP's products, 2026-11-27" in page and "CONNECTIONS=1, main_grad" in page
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


def test_page_of_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    layer = {"what": "layer", "sequence": 8192, "attention": "flash", "query_groups": 8, "connections": "8"}
    path.write_text(json.dumps(record(**layer)))
    page = write(path)
    assert "# Communication beside a transformer layer's products" in page and "CONNECTIONS=8, main_grad" in page
    assert "8 query groups, SwiGLU; causal attention (flash) in sequences of 8192 tokens, bf16" in page


def test_records_of_one_machine_are_joined(tmp_path: Path) -> None:
    one, other = record(), record()
    other["origin"]["command"], other["runs"][0]["tokens"] = "another command", 16384
    path = tmp_path / "record.json"
    path.write_text(json.dumps(joined([one, other])))
    page = write(path)
    assert "    a command\n    another command\n" in page and page.count("(record.png)") == 1
    assert page.index("28672, 8192 tokens") < page.index("28672, 16384 tokens")


@pytest.mark.parametrize("change", [{"tp": 2}, {"what": "layer"}, {"origin": {"machine": "2x a GPU"}}])
def test_records_of_other_settings_are_not_joined(change: dict[str, object]) -> None:
    other = record(**change)
    other["origin"] = record()["origin"] | other["origin"]
    with pytest.raises(ValueError, match=r"2.*pages of their own|'layer'; pages of their own"):
        joined([record(), other])


def test_kinds_of_kernels() -> None:
    names = ("nvjet_tst_128x256", "ncclDevKernel_SendRecv", "Memcpy DtoD", "barrier_kernel", "_forward_kernel")
    assert [kind(name) for name in names] == ["products", "NCCL", "copies", "barriers", "others"]

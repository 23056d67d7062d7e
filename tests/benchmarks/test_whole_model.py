"""Settings, arguments and page of ``benchmarks/whole_model.py`` on one GPU and on several."""

from typing import Any

import pytest

from benchmarks import whole_model
from benchmarks.record import Origin


def test_settings_under_tensor_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    one = list(whole_model.settings(whole_model.arguments([])))
    assert all("tensor_model_parallel_size" not in changes for _, changes, _ in one)
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = list(whole_model.settings(whole_model.arguments(["--tensor-parallel", "4"])))
    assert [name for name, *_ in found] == [
        *("dense", "tiled: default", "tiled: factor 4", "tiled: overlap auto"),
        *(f"tiled: overlap {steps} steps" for steps in (2, 3, 4)),
    ]
    parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    assert all(changes == parallel for _, changes, _ in found)
    steps = [{"tp_overlap": overlap} for overlap in ("auto", 2, 3, 4)]
    assert [tiling for *_, tiling in found] == [None, {}, {"factor": 4}, *steps]


@pytest.mark.parametrize(
    ("options", "processes", "complaint"),
    [
        ("--tensor-parallel 4", 1, "--tensor-parallel 4: there are 1 processes; torchrun --nproc-per-node 4 starts 4"),
        ("", 4, "--tensor-parallel 1: there are 4 processes"),
        ("--tensor-parallel 4 --fp8 tensorwise", 4, "--fp8: not with --tensor-parallel 4"),
        ("--tensor-parallel 4 --more", 4, "--more: not with --tensor-parallel 4"),
        ("--tensor-parallel 4 --experts 8", 4, "--experts: not with --tensor-parallel 4"),
    ],
)
def test_options_that_cannot_be(
    options: str,
    processes: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit):
        whole_model.arguments(options.split())
    assert complaint in capsys.readouterr().err


def record(**changes: Any) -> dict[str, Any]:
    row = {"milliseconds": [9.0, 10.0, 11.0], "median": 10.0, "host_milliseconds": [5.0], "busy_milliseconds": 9.0}
    row |= {"span_milliseconds": 10.0, "peak_mib": 100.0, "copies_mib": 0.0, "loss": 2.0, "kernels": {"gemm": [3, 4.0]}}
    origin = vars(Origin("2026-11-27", "a command", "a GPU", {"torch": "2.11"}))
    shared = {"title": "A GPT", "origin": origin, "attention": "flash", "fp8": None, "repeats": 3, "micro_batches": 4}
    return shared | {"candidates": [row | {"name": "dense"}, row | {"name": "tiled: default"}]} | changes


def test_page_of_one_gpu_and_of_four() -> None:
    one, four = whole_model.markdown(record()), whole_model.markdown(record(tensor_parallel=4))
    assert "a GPU, attention: flash; torch" in one and "slowest" not in one
    assert "a GPU, TP=4 with sequence parallelism, attention: flash; torch" in four
    assert "which begin with an idle GPU. Times are the slowest rank's" in four
    assert whole_model.markdown(record(tensor_parallel=1)) == one

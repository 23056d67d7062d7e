"""Which runs ``benchmarks/loss_parity.py`` trains, and when one of them is not what it is called."""

import argparse
import queue
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import loss_parity
from benchmarks.loss_parity import MODEL, OVERLAP, Run
from benchmarks.record import Origin
from megatron_tiling.tiles.step_comm import steps_for


def runs(**changes: Any) -> list[Run]:
    return list(
        loss_parity.runs_of(argparse.Namespace(**{"fp8": [], "tensor_parallel": [1, 4], "kinds": None} | changes))
    )


def arguments(output: Path, resume: bool) -> argparse.Namespace:
    files = {"script": "script", "data": "data", "cache": "cache", "tokenizer_model": "model", "output": output}
    return argparse.Namespace(**files, iterations=2, more=[], resume=resume)


def one_place() -> "queue.Queue[int]":
    places: queue.Queue[int] = queue.Queue()
    places.put(0)
    return places


def test_runs_overlap_where_there_is_communication() -> None:
    found = [run for run in runs() if run.kind == OVERLAP]
    assert [(run.group, run.gpus) for run in found] == [("TP=4", 4)]
    steps = int(found[0].flags[found[0].flags.index("--tiled-tp-overlap") + 1])
    sizes = [int(MODEL[MODEL.index(flag) + 1]) for flag in ("--seq-length", "--micro-batch-size")]
    assert steps_for(sizes[0] * sizes[1], steps) == steps
    assert not any(run.kind == OVERLAP for run in runs(fp8=["tensorwise"], tensor_parallel=[4]))


def test_kinds_beside_dense() -> None:
    assert [run.name for run in runs(kinds=[OVERLAP])] == ["TP=1 dense", "TP=4 dense", f"TP=4 {OVERLAP}"]


@pytest.mark.parametrize("says", [True, False])
def test_run_that_does_not_overlap_is_refused(says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(run for run in runs() if run.kind == OVERLAP)
    table = "megatron_tiling: tiled linear layers\n" + "communication behind products from 2048 tokens on\n" * says

    def trains(command: list[str], stdout: Any, **options: Any) -> SimpleNamespace:
        assert command[-3:] == ["--use-tiled-linear", "--tiled-tp-overlap", "3"]
        stdout.write(f"{table}lm loss: 8.5E+00\nlm loss: 8.0E+00\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", trains)
    args, places = arguments(tmp_path, resume=False), one_place()
    if says:
        assert loss_parity.train(args, run, places) == [8.5, 8.0]
    else:
        with pytest.raises(SystemExit, match="the startup table says nothing of communication behind products"):
            loss_parity.train(args, run, places)


def test_resumed_runs_are_those_of_the_same_command_that_did_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def trains(command: list[str], stdout: Any, **options: Any) -> SimpleNamespace:
        trained.append(Path(stdout.name).name)
        stdout.write("lm loss: 7.5E+00\nlm loss: 7.0E+00\n[after training is done]\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", trains)
    args, places = arguments(tmp_path, resume=False), one_place()
    ended, cut_off = (Run("TP=4", kind, 4, ()) for kind in ("dense", "dense, half the micro-batch"))
    logs = [f"loss_parity.TP=4_{name}.log" for name in ("dense", "dense_half_the_micro_batch")]
    for run in (ended, cut_off):
        loss_parity.train(args, run, places)
    log = tmp_path / logs[1]
    log.write_text(log.read_text().replace("[after training is done]", ""))
    args.resume = True
    for run in (ended, cut_off):
        assert loss_parity.train(args, run, places) == [7.5, 7.0]
    assert trained == [*logs, logs[1]]
    args.more = ["--lr", "1e-3"]
    loss_parity.train(args, ended, places)
    assert trained == [*logs, logs[1], logs[0]]
    args.iterations, args.more = 3, []
    with pytest.raises(SystemExit, match="TP=4 dense failed"):
        loss_parity.train(args, ended, places)


def test_page_without_a_picture() -> None:
    args = argparse.Namespace(iterations=2, fp8=[])
    found = {Run("TP=4", kind, 4, ()): [8.5, 8.0] for kind in ("dense", "tiled")}
    page = loss_parity.report(found, args, Origin("2000-01-01", "command", "GPU", {}), None)
    assert "![" not in page and "| TP=4 tiled | 0.0000 | 0.0000 |" in page


def test_too_few_gpus_are_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--script s --data d --tokenizer-model m --output {tmp_path} --tensor-parallel 1 4"
    monkeypatch.setattr("sys.argv", ["loss_parity", *options.split()])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(SystemExit, match="2"):
        loss_parity.main()
    assert "there are 2 GPUs, and runs want 4" in capsys.readouterr().err

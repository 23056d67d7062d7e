"""What benchmarks take of their command lines, and what they refuse."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import end_to_end, lora, whole_model
from benchmarks.arguments import above_zero, at_least, output_folder, positive


@pytest.mark.parametrize(
    ("type_", "text", "complaint"),
    [
        (positive, "0", "0 is too small: give 1 or more"),
        (positive, "-3", "-3 is too small: give 1 or more"),
        (at_least(0), "-1", "-1 is too small: give 0 or more"),
        (positive, "1.5", "1.5 is not an integer"),
        (above_zero, "0", "0 is not a finite number above zero"),
        (above_zero, "nan", "nan is not a finite number above zero"),
        (above_zero, "inf", "inf is not a finite number above zero"),
        (above_zero, "much", "much is not a number"),
    ],
)
def test_number_that_cannot_be_used(type_: Callable[[str], float], text: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{complaint}$"):
        type_(text)


def test_numbers_that_can() -> None:
    assert (positive("1"), at_least(0)("0"), above_zero("79.2")) == (1, 0, 79.2)


def test_folder_is_made_before_anything_is_measured(tmp_path: Path) -> None:
    made = output_folder(f"{tmp_path}/some/where")
    assert made.is_dir() and output_folder(str(made)) == made
    file = tmp_path / "file"
    file.touch()
    for text in (str(file), f"{file}/below"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} cannot be made a folder: "):
            output_folder(text)


def test_benchmarks_that_write_make_their_folders_first() -> None:
    """All of them, by the same type."""
    options = [
        (path.stem, option.group())
        for path in Path(end_to_end.__file__).parent.glob("*.py")
        for option in re.finditer(r'"--(results|output)", [^)]*', path.read_text())
    ]
    assert len(options) >= 15
    assert [each for each in options if "type=output_folder" not in each[1]] == []


@pytest.mark.parametrize(
    ("main", "options", "complaint"),
    [
        (whole_model.main, "--micro-batches 0", "argument --micro-batches: 0 is too small: give 1 or more"),
        (whole_model.main, "--repeats 1", "argument --repeats: 1 is too small: give 2 or more"),
        (whole_model.main, "--layers 0", "argument --layers: 0 is too small: give 1 or more"),
        (whole_model.main, "--experts -1", "argument --experts: -1 is too small: give 0 or more"),
        (lora.main, "--rank 0", "argument --rank: 0 is too small: give 1 or more"),
        (
            end_to_end.main,
            "--script a --output b --iterations 5",
            "--warm-up 5: must be less than --iterations 5",
        ),
    ],
)
def test_benchmark_says_which_option(
    main: Callable[[], None],
    options: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err

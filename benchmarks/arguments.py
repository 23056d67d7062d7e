"""What stands on command lines: what a benchmark cannot use is refused before it starts."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of an option that takes integers from ``least`` on."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not an integer") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: give {least} or more")
        return number

    return integer


positive = at_least(1)


def above_zero(text: str) -> float:
    """The ``type`` of an option that takes any finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above zero")
    return number


def output_folder(text: str) -> Path:
    """The ``type`` of an option that takes a folder to write to, which is made: what was measured shall not be lost."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made a folder: {error.strerror}") from None
    return path

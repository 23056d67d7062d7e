"""Numbers on command lines: those that a benchmark cannot use are refused before it starts."""

import argparse
import math
from collections.abc import Callable


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

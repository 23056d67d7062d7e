"""The longest sequence that fits, by as few plans as possible.

Peaks grow with a line of tokens, or with a few, one after the other, where nothing in the model grows with their
square: each guess is where lines through the nearest known peaks meet the limit. What is found has a plan of its own.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Callable, Generator, Mapping

#: Searches end where this share of the sequence is not worth another plan.
TOLERANCE = 1 / 64

#: Yields lengths, is sent their peaks, and returns the longest length that fits.
Search = Generator[int, float, int]


def search(limit: float, start: int, multiple: int) -> Search:
    """Of multiples of ``multiple``; 0 if not even one fits. ``start`` is a guess."""
    peaks = {0: 0.0}
    length = max(start // multiple, 1) * multiple
    while True:
        peaks[length] = yield length
        fits = max(known for known in peaks if peaks[known] <= limit)
        beyond = min((known for known in peaks if peaks[known] > limit), default=None)
        step = max(multiple, int(fits * TOLERANCE) // multiple * multiple)
        if beyond is not None and beyond - fits <= step:
            return fits
        known = sorted(peaks)[1:]
        if len(known) == 1:  # the second peak tells what grows
            length = length * 2 if fits else max(length // 2 // multiple, 1) * multiple
            continue
        at = bisect.bisect_right(known, fits)
        pairs = itertools.pairwise((length, peaks[length]) for length in known[max(at - 2, 0) : at + 2])
        guesses = [max(fits, min(_meets(limit, *pair), beyond or 2**62)) for pair in pairs]
        length = int(statistics.fmean(guesses) / multiple) * multiple
        if len(known) > 2 and fits and max(guesses) < fits + step:  # no line from here goes further
            return fits
        length = max(length, fits + multiple)
        if beyond is not None:
            length = min(length, max(beyond - step, fits + step))


def _meets(limit: float, one: tuple[int, float], other: tuple[int, float]) -> float:
    """Where the line through two points does."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return max(one[0] + (limit - one[1]) / max(slope, limit / 2**30), 0)


def longest[T](searches: Mapping[T, Search], peaks: Callable[[Mapping[T, int]], Mapping[T, float]]) -> dict[T, int]:
    """Searches side by side. ``peaks`` of some of them, of a length each, are asked for together."""
    found: dict[T, int] = {}
    asked = {key: next(one) for key, one in searches.items()}
    while asked:
        answers, asked = peaks(asked), {}
        for key, peak in answers.items():
            try:
                asked[key] = searches[key].send(peak)
            except StopIteration as end:
                found[key] = end.value
    return found

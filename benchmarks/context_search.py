"""The longest sequence of each setting, and then their times: which steps are taken, whatever takes them.

What an earlier record knows is not searched, or is where the search begins.

Every decision follows from numbers that all ranks have alike: all of them take the same steps in the same order.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks import ranks
from benchmarks.record import Origin

STEP = 1024
#: A tiled setting is an answer to a stock one where it goes this much farther.
FARTHER = 1.5
#: Of the memory, over several ranks: what the search heads for, and what it takes at most. A rank that ran out of it
#: would leave the others in a collective, and experts' rows are never the same on all of them.
TARGET, MOST = 0.97, 0.98
#: Over several ranks the next length to try is at most so many times the last.
LEAP = 4
#: Of the longest context elsewhere: where a search begins that knows it.
NEAR = 0.9


@dataclass
class Setting:
    """A model, and what was found of it: tokens that fit, peak GiB by tokens, seconds of a step by tokens.

    Over several ranks they are a rank's tokens, the peak of the fullest rank and the seconds of the slowest.
    ``elsewhere`` are the tokens that fit on another machine, where that is known.
    """

    name: str
    model: Any
    tiled: bool
    longest: int = 0
    elsewhere: int = 0
    peaks: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def tokens_per_second(self, tokens: int) -> float:
        return tokens / statistics.median(self.seconds[tokens])


class Trainer(Protocol):
    """Takes training steps. All that it returns is the same on all ranks."""

    found: list[Setting]

    def step(self, setting: Setting, tokens: int) -> float | None:
        """Seconds of one step, whose peak it adds to the setting, or ``None`` where the memory does not suffice."""

    def limit(self) -> float:
        """GiB that every rank can allocate."""


class Search:
    """Of all settings of a trainer.

    Args:
        repeats: timed steps of a setting that is worth it.
        save: called whenever something was found.
        most: tokens, beyond which nothing is tried.
        time_limit: seconds from ``begin`` after which neither a search nor a timing starts.
        begin: as of ``time.monotonic``.
    """

    def __init__(
        self,
        trainer: Trainer,
        repeats: int,
        save: Callable[[], None],
        most: int,
        time_limit: float | None = None,
        begin: float | None = None,
    ) -> None:
        self._trainer, self._repeats, self._save = trainer, repeats, save
        self._most = most // STEP * STEP
        self._time_limit, self._begin = time_limit, time.monotonic() if begin is None else begin
        self.cut = False  # whether something was not begun
        self._random = random.Random(ranks.of_first(random.getrandbits(32)))
        self._several = ranks.count() > 1

    def run(self) -> None:
        for setting in self._trainer.found:
            if setting.longest:  # it is known
                continue
            if self._late():
                break
            self.find_longest(setting)
            self._save()
        searched = [setting for setting in self._trainer.found if setting.longest]
        torch._dynamo.reset()
        if not self._several:  # over several ranks a step has other numbers of rows for its experts than the last one
            # The search has seen many sizes: compiled functions of one size each, as a run has them, from here on.
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = 1000
        for stock in searched:
            if not stock.tiled:
                if self._late():
                    return
                self._time_beside_answers(stock, [s for s in searched if s.tiled])
                self._save()
        for setting in searched:
            if setting.longest not in setting.seconds:
                if self._late():
                    return
                self.compare(setting.longest, [setting], 2)
                self._save()

    def _late(self) -> bool:
        """Whether the time limit of one rank is over, so that what comes next is not begun. A collective."""
        if self._time_limit is not None and not self.cut:
            self.cut = ranks.largest(time.monotonic() - self._begin)[0] > self._time_limit
        return self.cut

    def find_longest(self, setting: Setting) -> None:
        """Peaks grow with a straight line of tokens: walk to where it meets the limit.

        Running out of memory is avoided, since what a failed step leaves behind falsifies the next one.

        Raises:
            RuntimeError: not even 4096 tokens fit.
        """
        step, target = self._trainer.step, self._trainer.limit() * (TARGET if self._several else 1.0)
        lengths, share = self._first_lengths(setting)
        while True:
            last = lengths[-1]
            before = max(length for length in lengths if length <= last // 2) if self._several else lengths[-2]
            slope = (setting.peaks[last] - setting.peaks[before]) / (last - before)
            to_go = share * (target - setting.peaks[last]) / slope if slope > 0 else last
            guess = min(last + int(to_go / STEP) * STEP, self._most)
            if guess <= last:
                break
            leaps = self._several and guess > LEAP * last
            if leaps:
                guess = LEAP * last
            if not self._fits(setting, guess):
                target -= 0.01 * target  # memory lies in pieces
                step(setting, STEP)  # takes the place of what the failed step has left
            else:
                lengths.append(guess)
                share = share if leaps else 1.0
        setting.longest = last
        step(setting, STEP)  # dispatchers of experts hold on to tensors of the last tokens
        ranks.say(f"{setting.name}: {last} tokens, {setting.peaks[last]:.1f} GiB")

    def _first_lengths(self, setting: Setting) -> tuple[list[int], float]:
        """Two lengths that fit, and the share of the way to go that the line through them is good for."""
        starts = [(2 * STEP, 4 * STEP, 0.8)]  # a line that is drawn from afar
        near = min(int(NEAR * setting.elsewhere), self._most) // (2 * STEP) * STEP
        if near >= 4 * STEP:
            starts.insert(0, (near, 2 * near, 1.0))
        for shorter, longer, share in starts:
            if self._fits(setting, shorter) and self._fits(setting, longer):
                return [shorter, longer], share
            self._trainer.step(setting, STEP)  # takes the place of what the failed step has left
        raise RuntimeError(f"{setting.name}: {4 * STEP} tokens do not fit; take a smaller model")

    def _fits(self, setting: Setting, tokens: int) -> bool:
        """Whether a step does, over several ranks with something to spare."""
        if self._trainer.step(setting, tokens) is None:
            return False
        if self._several and setting.peaks[tokens] > MOST * self._trainer.limit():
            del setting.peaks[tokens]
            return False
        return True

    def _time_beside_answers(self, stock: Setting, tiled: list[Setting]) -> None:
        """At the longest context of a stock setting: it, and the two fastest of the tiled ones that go far enough."""
        tokens = stock.longest
        answers = [setting for setting in tiled if setting.longest >= FARTHER * tokens]
        self.compare(tokens, [stock, *answers], 2)  # which of them is worth the repeats
        timed = [setting for setting in answers if setting.seconds.get(tokens)]
        best = sorted(timed, key=lambda setting: setting.tokens_per_second(tokens), reverse=True)[:2]
        for setting in answers:
            if setting not in best:
                setting.seconds.pop(tokens, None)
        if not self._late():
            for setting in [stock, *best]:
                setting.seconds[tokens] = []
            self.compare(tokens, [stock, *best], self._repeats)

    def compare(self, tokens: int, rivals: list[Setting], repeats: int) -> None:
        """Seconds of steps of ``tokens`` tokens, interleaved in random order, after a warm-up."""
        step = self._trainer.step
        for setting in rivals:
            step(setting, tokens)
            step(setting, STEP)
        order = list(rivals)
        for done in range(repeats):
            if done and self._late():
                break
            self._random.shuffle(order)
            for setting in order:
                seconds = step(setting, tokens)
                if seconds is not None:
                    setting.seconds.setdefault(tokens, []).append(seconds)
                step(setting, STEP)


def take_known(record: dict[str, Any], conditions: dict[str, Any], origin: Origin, found: list[Setting]) -> list[str]:
    """Give settings the longest context and the peaks that an earlier record has of them.

    Where its GPUs have another memory, or machine or packages are others, its lengths are where the search begins.

    Returns:
        The names of these settings, or none where they are searched all the same.

    Raises:
        SystemExit: the record is of another model or number of GPUs, or its search ended elsewhere.
    """
    of_record = record["origin"] | record
    here = conditions | {"machine": origin.machine, "versions": origin.versions}
    unlike = [name for name, value in here.items() if of_record.get(name) != value]
    for name in unlike:
        if name in ("model", "gpus", "most"):
            raise SystemExit(f"--known: the record's {name} is {of_record.get(name)}, and here it is {here[name]}")
    rows = {row["name"]: row for row in record["settings"]}
    known = [setting for setting in found if setting.name in rows]
    if unlike:
        ranks.say(f"--known: another {', another '.join(unlike)}; the search begins near its longest contexts")
        for setting in known:
            setting.elsewhere = tokens_within(conditions["limit"], rows[setting.name])
        return []
    for setting in known:
        row = rows[setting.name]
        setting.longest, setting.peaks = row["longest"], {int(tokens): peak for tokens, peak in row["peaks"].items()}
    return [setting.name for setting in known]


def tokens_within(limit: float, row: dict[str, Any]) -> int:
    """Of a setting in a record: its longest context, or where the line to its peak meets a lower limit in GiB."""
    peaks = {int(tokens): peak for tokens, peak in row["peaks"].items()}
    longest, shortest = row["longest"], min(peaks)
    most, least = peaks[longest], peaks[shortest]
    if most <= limit:
        return longest
    return max(0, shortest + int((longest - shortest) * (limit - least) / (most - least))) if most > least else 0

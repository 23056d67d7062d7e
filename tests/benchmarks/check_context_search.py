"""The search for the longest context over ranks that need unlike memory and time, on a trainer that only reckons.

torchrun --nproc-per-node 2 -m tests.benchmarks.check_context_search searches | fails FILE
"""

import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.context_search import FARTHER, MOST, STEP, Search, Setting
from tests.support.harness import leave

HELD, LIMIT = 50.0, 80.0
MOST_TOKENS = 2**20
#: GiB of 1024 tokens, and milliseconds.
COSTS = {"stock": (2.0, 50.0), "stock, recompute": (0.9, 70.0), "tiled: fast": (1.0, 52.0), "tiled: small": (0.1, 90.0)}


class Reckoning:
    """Experts of this rank get some rows more or less at every step."""

    def __init__(self, unlike: random.Random, fails: str = "") -> None:
        self.found = [Setting(name, None, name.startswith("tiled")) for name in COSTS]
        self.steps: list[tuple[str, int]] = []
        self.own_peaks: list[float] = []
        self.held = HELD * 2**30
        self._unlike, self._fails = unlike, fails

    def step(self, setting: Setting, tokens: int) -> float | None:
        if setting.name == self._fails:
            raise RuntimeError(f"{setting.name}: out of memory at {tokens} tokens")
        self.steps.append((setting.name, tokens))
        gib, milliseconds = (cost * tokens / STEP * self._unlike.uniform(0.98, 1.02) for cost in COSTS[setting.name])
        self.own_peaks.append(HELD + gib)
        peak, seconds = ranks.largest(HELD + gib, milliseconds / 1000)
        if peak > LIMIT:
            return None
        setting.peaks[tokens] = peak
        return seconds

    def limit(self) -> float:
        return -ranks.largest(-LIMIT - (0 if ranks.is_first() else 3))[0]


def alike(found: object) -> None:
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(other == everywhere[0] for other in everywhere), everywhere


def check_search(unlike: random.Random) -> None:
    trainer = Reckoning(unlike)
    saves = []
    Search(trainer, 3, lambda: saves.append(len(trainer.steps)), MOST_TOKENS).run()
    alike(trainer.steps)
    alike(saves)
    alike([(setting.longest, setting.peaks, setting.seconds) for setting in trainer.found])
    others: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(others, trainer.own_peaks)
    assert others[0] != others[1]  # what was agreed upon did differ
    stock, recompute, fast, small = trainer.found
    for setting in trainer.found:
        assert 0.93 * LIMIT < setting.peaks[setting.longest] <= MOST * LIMIT, setting
    assert set(stock.seconds) == {stock.longest} and len(stock.seconds[stock.longest]) == 3
    assert fast.longest >= FARTHER * stock.longest
    assert len(fast.seconds[stock.longest]) == len(small.seconds[stock.longest]) == 3
    assert recompute.longest not in fast.seconds and len(small.seconds[recompute.longest]) == 3
    assert all(setting.longest in setting.seconds for setting in trainer.found)
    assert torch._dynamo.config.automatic_dynamic_shapes  # rows of experts differ in every step
    assert len(saves) == len(trainer.found) + 2 + 2  # longest ones, two stock settings, two more of tiled ones


def check_time_limit(unlike: random.Random) -> None:
    trainer = Reckoning(unlike)
    begin = time.monotonic() - (0 if ranks.is_first() else 1000)
    search = Search(trainer, 3, lambda: None, MOST_TOKENS, 500, begin)
    search.run()
    assert search.cut and not trainer.steps
    search = Search(trainer, 3, lambda: None, MOST_TOKENS, 500)
    search.run()
    assert not search.cut and trainer.steps


def check_repeats_that_are_late(unlike: random.Random) -> None:
    """The time is over on one rank while the first of ten timings runs."""
    trainer = Reckoning(unlike)
    search = Search(trainer, 10, lambda: None, MOST_TOKENS, 500)
    search._begin -= 0 if ranks.is_first() else 1000
    search.compare(4 * STEP, trainer.found, 10)
    assert search.cut
    assert [len(setting.seconds[4 * STEP]) for setting in trainer.found] == [1] * len(COSTS)


def main() -> None:
    dist.init_process_group("gloo")
    what, *file = sys.argv[1:]
    unlike = random.Random(dist.get_rank())
    if what == "searches":
        for check in (check_search, check_time_limit, check_repeats_that_are_late):
            check(unlike)
            print(f"{check.__name__} holds", flush=True)
    with ranks.ending_together():
        if what == "fails":
            trainer = Reckoning(unlike, "" if ranks.is_first() else "tiled: fast")

            def save() -> None:
                if ranks.is_first():
                    Path(file[0]).write_text("\n".join(setting.name for setting in trainer.found if setting.longest))

            Search(trainer, 3, save, MOST_TOKENS).run()
    leave()


if __name__ == "__main__":
    main()

"""The search for the longest sequence: what it finds, and how many plans it takes."""

import itertools
from collections.abc import Callable, Mapping

import pytest

from megatron_tiling.plan.longest import TOLERANCE, longest, search

LIMIT = 76.5
#: GiB by tokens: as measured of the 3B model; of attention with scores; with logits that stop growing.
PEAKS: dict[str, Callable[[int], float]] = {
    "line": lambda n: 54.87 + 0.004 * n,
    "flat": lambda n: 54.87 + 0.0002 * n,
    "two phases": lambda n: max(60 + 0.0001 * n, 55 + 0.0005 * n),
    "square": lambda n: 55 + 1e-4 * n + 1e-7 * n * n,
    "logits in tiles": lambda n: 55 + min(1.0, 0.002 * n) + 0.0003 * n,
    "too large": lambda n: 80 + 0.001 * n,
    "one step": lambda n: 76.3 + 0.001 * n,
}


@pytest.mark.parametrize(("start", "multiple"), list(itertools.product([1024, 4096, 131072], [128, 1024])))
def test_what_is_found(start: int, multiple: int) -> None:
    plans = dict.fromkeys(PEAKS, 0)

    def peaks(asked: Mapping[str, int]) -> dict[str, float]:
        for name, length in asked.items():
            assert length > 0 and length % multiple == 0
            plans[name] += 1
        return {name: PEAKS[name](length) for name, length in asked.items()}

    found = longest({name: search(LIMIT, start, multiple) for name in PEAKS}, peaks)
    for name, tokens in found.items():
        best = max(n for n in range(0, 2**18, multiple) if not n or PEAKS[name](n) <= LIMIT)
        assert tokens <= best <= tokens + max(multiple, TOLERANCE * tokens), name
    assert plans["line"] <= 3 and plans["flat"] <= 4
    assert max(plans[name] for name in PEAKS if name not in ("too large", "one step")) <= 10, plans

"""The search for the longest context, over one rank and over several, and its page."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import longest_context
from benchmarks.context_search import STEP, Search, Setting
from tests.benchmarks.check_context_search import COSTS, HELD, LIMIT, MOST_TOKENS, Reckoning
from tests.support.launch import torchrun

CHECK = "tests.benchmarks.check_context_search"


def test_ranks_take_the_same_steps() -> None:
    output = torchrun("-m", CHECK, "searches", world=2)
    for check in ("check_search", "check_time_limit", "check_repeats_that_are_late"):
        assert output.count(f"{check} holds") == 2, output


def test_a_rank_that_fails_ends_all_and_what_was_found_stays(tmp_path: Path) -> None:
    output = torchrun("-m", CHECK, "fails", tmp_path / "found", world=2, fails=True)
    assert "rank 1 failed" in output and "RuntimeError: tiled: fast: out of memory at 2048 tokens" in output, output
    assert (tmp_path / "found").read_text().split("\n") == ["stock", "stock, recompute"]


class Line:
    """Peaks that grow with a line of tokens, on one GPU."""

    def __init__(self, gib: float) -> None:
        self.found = [Setting("stock", gib, False)]
        self.tokens: list[int] = []

    def step(self, setting: Setting, tokens: int) -> float | None:
        self.tokens.append(tokens)
        peak = HELD + setting.model * tokens / STEP
        if peak > LIMIT:
            return None
        setting.peaks[tokens] = peak
        return 1.0

    def limit(self) -> float:
        return LIMIT


@pytest.mark.parametrize("gib", [0.05, 0.7, 1.0, 3.0, 7.5])
def test_one_gpu_is_filled(gib: float) -> None:
    trainer = Line(gib)
    Search(trainer, 1, lambda: None, MOST_TOKENS).find_longest(trainer.found[0])
    fits = int((LIMIT - HELD) / gib)
    assert 0.8 * fits - 1 <= trainer.found[0].longest / STEP <= fits
    assert trainer.tokens[:2] == [2 * STEP, 4 * STEP] and max(trainer.tokens) <= fits * STEP


def test_nothing_is_tried_beyond_the_most(reckoned: Reckoning) -> None:
    stock, *_, small = reckoned.found
    search = Search(reckoned, 3, lambda: None, 40 * STEP + 1)
    for setting in (stock, small):
        search.find_longest(setting)
    assert stock.longest < 20 * STEP and small.longest == 40 * STEP
    assert max(tokens for _, tokens in reckoned.steps) == 40 * STEP
    found = record(reckoned, "--sequence", str(40 * STEP + 1))
    page = longest_context.markdown(found)
    assert f"| tiled: small | {40 * STEP} or more | " in page and f"| stock | {stock.longest} | " in page


def test_a_model_that_is_too_large() -> None:
    trainer = Line(8.0)
    with pytest.raises(RuntimeError, match="stock: 4096 tokens do not fit; take a smaller model"):
        Search(trainer, 1, lambda: None, MOST_TOKENS).find_longest(trainer.found[0])


@pytest.fixture
def reckoned() -> Reckoning:
    return Reckoning(random.Random(0))


def record(trainer: Any, *options: str, cut: bool = False) -> dict[str, Any]:
    args = longest_context.arguments(["--time-limit", "300", "--repeats", "3", *options])
    origin = longest_context.Origin("2000-01-01", "command", "GPU", {"torch": "2"})
    found: dict[str, Any] = json.loads(json.dumps(longest_context.record_of(args, origin, trainer, cut)))
    return found


def test_what_was_found_is_written_after_every_setting(
    reckoned: Reckoning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "found.json"
    pages = []
    monkeypatch.setattr(torch._dynamo.config, "automatic_dynamic_shapes", True)
    Search(reckoned, 3, lambda: pages.append(longest_context.write(record(reckoned), path)), MOST_TOKENS).run()
    for number, page in itertools.islice(enumerate(pages, 1), len(COSTS)):
        names = list(COSTS)
        assert (f"Not searched: {'; '.join(names[number:])}." in page) == (number < len(names))
        assert all((f"\n| {name} | " in page) == (name in names[:number]) for name in names)
        assert page.count("not measured") == number
    assert not torch._dynamo.config.automatic_dynamic_shapes
    assert "not measured" not in pages[-1] and "Not searched" not in pages[-1]
    assert path.with_suffix(".md").read_text() == pages[-1]
    assert longest_context.markdown(json.loads(path.read_text())) == pages[-1]
    assert sorted(file.name for file in path.parent.iterdir()) == ["found.json", "found.md"]
    longest_context.picture(json.loads(path.read_text()), path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size


def test_what_an_earlier_record_knows_is_not_searched(reckoned: Reckoning, tmp_path: Path) -> None:
    Search(reckoned, 3, lambda: None, MOST_TOKENS).run()
    earlier = record(reckoned)
    first, *others = earlier["settings"]
    path = tmp_path / "2000-01-01-earlier.json"
    path.touch()
    args = longest_context.arguments(["--known", str(path)])
    origin = longest_context.Origin(**earlier["origin"])
    again = Reckoning(random.Random(0))
    conditions = longest_context.conditions_of(args, again)
    known = longest_context.take_known(earlier | {"settings": others}, conditions, origin, again.found)
    assert known == [row["name"] for row in others]
    assert [(one.longest, one.peaks) for one in again.found[1:]] == [
        (one.longest, one.peaks) for one in reckoned.found[1:]
    ]
    Search(again, 3, lambda: None, MOST_TOKENS).run()
    assert again.found[0].longest and 4 * STEP in [tokens for name, tokens in again.steps if name == first["name"]]
    tried = [tokens for name, tokens in again.steps if name == others[-1]["name"]]
    assert tried and max(tried) <= others[-1]["longest"] and 4 * STEP not in tried
    found = json.loads(json.dumps(longest_context.record_of(args, origin, again, False, known)))
    assert f"are those of 2000-01-01-earlier: {'; '.join(known)}." in longest_context.markdown(found)
    for name, other in (("model", "another"), ("gpus", 2), ("most", STEP)):
        with pytest.raises(SystemExit, match=f"--known: the record's {name} is "):
            longest_context.take_known(earlier | {name: other}, conditions, origin, again.found)


@pytest.mark.parametrize(("name", "other"), [("limit", 1.0), ("machine", "TPU"), ("versions", {})])
def test_the_search_begins_where_it_ended_on_another_machine(reckoned: Reckoning, name: str, other: Any) -> None:
    Search(reckoned, 3, lambda: None, MOST_TOKENS).run()
    earlier = record(reckoned)
    there = earlier | {"origin": earlier["origin"] | {name: other}, **({name: other} if name in earlier else {})}
    args, origin = longest_context.arguments([]), longest_context.Origin(**earlier["origin"])
    again = Reckoning(random.Random(1))
    assert not longest_context.take_known(there, longest_context.conditions_of(args, again), origin, again.found)
    Search(again, 3, lambda: None, MOST_TOKENS).run()
    for setting, before in zip(again.found, reckoned.found, strict=True):
        tried = [tokens for name, tokens in again.steps if name == setting.name and tokens > STEP]
        assert tried[0] == int(0.9 * before.longest) // (2 * STEP) * STEP >= 4 * STEP
        assert setting.longest == pytest.approx(before.longest, rel=0.1) and not setting.peaks.get(4 * STEP)
    assert all("elsewhere" not in row for row in record(again)["settings"])


@pytest.mark.parametrize("limit", [77.0, 65.0, 51.0, 40.0])
def test_no_length_of_a_larger_gpu_is_tried_on_a_smaller_one(reckoned: Reckoning, limit: float) -> None:
    """Over several ranks a step that does not fit is the end of the run."""
    Search(reckoned, 3, lambda: None, MOST_TOKENS).run()
    earlier = record(reckoned)
    origin, here = longest_context.Origin(**earlier["origin"]), earlier | {"limit": limit}
    conditions = {name: here[name] for name in ("model", "gpus", "limit", "most")}
    again = Reckoning(random.Random(1))
    assert not longest_context.take_known(earlier, conditions, origin, again.found)
    for setting, before in zip(again.found, reckoned.found, strict=True):
        share = (limit - HELD) / (before.peaks[before.longest] - HELD)
        assert setting.elsewhere == pytest.approx(max(share, 0) * before.longest, rel=0.06, abs=STEP)


@pytest.mark.parametrize("elsewhere", [3 * STEP, 10 * STEP, 29 * STEP, 60 * STEP, 2**21])
def test_a_length_from_elsewhere_may_be_far_from_ours(elsewhere: int) -> None:
    trainer = Line(1.0)
    trainer.found[0].elsewhere = elsewhere
    Search(trainer, 1, lambda: None, MOST_TOKENS).find_longest(trainer.found[0])
    fits = LIMIT - HELD
    assert 0.8 * fits - 1 <= trainer.found[0].longest / STEP <= fits


def test_page_of_one_gpu_and_of_two(reckoned: Reckoning, monkeypatch: pytest.MonkeyPatch) -> None:
    Search(reckoned, 3, lambda: None, MOST_TOKENS).find_longest(reckoned.found[0])
    page = longest_context.markdown(record(reckoned))
    assert page.startswith("# The longest context that trains on one GPU, 2000-01-01\n")
    assert "Experts" not in page and "After 300 seconds" not in page
    page = longest_context.markdown(record(reckoned, "--experts", "128", "--heads", "32", cut=True))
    assert "\nExperts: tokens choose them by a router of random weights, which nothing balances.\n" in page
    assert (
        "h=3072, 32 heads, 128 experts of ffn=768, top-8, 8 groups, " in page
        and "After 300 seconds nothing more was begun" in page
    )
    found = record(reckoned, "--experts", "128") | {"gpus": 2}
    page = longest_context.markdown(found)
    assert page.startswith("# The longest context that trains on 2 GPUs, 2000-01-01\n")
    assert "Tokens/s are of one GPU, by the slowest" in page and "more than 98% of 80.0 GiB" in page


@pytest.mark.parametrize(
    ("options", "processes", "complaint"),
    [
        (
            "--experts 8 --expert-parallel 2",
            1,
            "--expert-parallel 2: there are 1 processes; torchrun --nproc-per-node",
        ),
        ("--experts 8", 2, "--expert-parallel 1: there are 2 processes"),
        ("--expert-parallel 2", 2, "--expert-parallel 2: --experts 0 must be a multiple of it"),
        ("--experts 3 --expert-parallel 2", 2, "--expert-parallel 2: --experts 3 must be a multiple of it"),
        ("--settings stock tilde", 1, "--settings: there is no 'tilde'; of this model there are 'stock', "),
        ("--sequence 4095", 1, "--sequence 4095: the search begins with 4096"),
        ("--gpu-memory-gib 0", 1, "argument --gpu-memory-gib: 0 is not a finite number above zero"),
        ("--known nowhere.json", 1, "--known nowhere.json: there is no such file"),
        ("--time-limit 0", 1, "argument --time-limit: 0 is not a finite number above zero"),
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
        longest_context.arguments(options.split())
    assert complaint in capsys.readouterr().err


def test_options_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert longest_context.arguments("--experts 128 --expert-parallel 2".split()).expert_parallel == 2

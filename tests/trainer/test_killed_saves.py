"""A run that is killed while it saves a checkpoint continues from the last complete one."""

import re
from pathlib import Path

import pytest

from tests.trainer.test_checkpoints import TWO_RANKS, arguments, entry, losses, run_together

# When a start is killed: at its n-th file operation in the checkpoint's folder (-1: as it opens the tracker file), and
# so many seconds later, which reaches moments within writing.
KILLS = [(operation, delay) for operation in range(5) for delay in (0.0, 0.001, 0.004)]
KILLS += [(2, 0.008), (2, 0.016), (5, 0.0), (-1, 0.0), (-1, 0.0)]
FIRST_STOP, ITERATIONS = 2, 26  # a late kill may leave a complete checkpoint: 20 of them, and some iterations more


@pytest.mark.feature("resuming after a save that was killed")
def test_every_start_resumes_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """20 starts in a row of one tiled run, each of which finds what the killed one before left behind."""
    saved, world = str(tmp_path / "saved"), TWO_RANKS.world
    flags = arguments(TWO_RANKS, tmp_path)
    flags = [*flags[: flags.index("--save")], "--train-iters", str(ITERATIONS)]
    saving = [*flags, "--save", saved, "--load", saved, "--save-interval", "1"]
    entries = [entry("uninterrupted", flags, tmp_path / "uninterrupted")]
    entries.append(entry("first", [*saving, "--exit-interval", str(FIRST_STOP)], tmp_path / "first"))
    for number, (operation, delay) in enumerate(KILLS):
        kill = {"folder": saved, "operation": operation, "delay": delay}
        entries.append(entry(str(number), saving, tmp_path / str(number)) | {"kill": kill})
    entries.append(entry("last", [*flags, "--load", saved], tmp_path / "last"))
    run_together(entries, tmp_path / "runs.json", world)

    expected, complete = losses(tmp_path / "uninterrupted", world), FIRST_STOP
    for name in (*map(str, range(len(KILLS))), "last"):
        text = "".join((tmp_path / f"{name}.{rank}").read_text() for rank in range(world))
        assert ("killed" in text) == (name != "last"), f"start {name}: {text[-3000:]}"
        resumed = re.search(rf"successfully loaded checkpoint from {saved} .* at iteration (\d+)", text)
        assert resumed, f"start {name}: {text[-3000:]}"
        # A start that was killed after it wrote the tracker file has left one complete checkpoint more.
        assert complete <= int(resumed[1]) <= complete + 1
        found = losses(tmp_path / name, world)
        assert min(found) == int(resumed[1]) + 1
        complete = max(found) - 1
        compared = [iteration for iteration in found if iteration != min(found) + 1]  # which logs a mean of two
        assert [found[iteration] for iteration in compared] == [expected[iteration] for iteration in compared]
    assert list(found)[-1] == ITERATIONS

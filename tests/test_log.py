"""What the package says: to standard output, once."""

import logging
import sys

import pytest

from megatron_tiling.log import log_on_rank_0, logger


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("3", False)])
def test_rank_0_speaks(
    rank: str | None, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    log_on_rank_0("a line")
    output = capsys.readouterr()
    assert output.out == ("megatron_tiling: a line\n" if said else "") and not output.err


def test_handlers_of_the_root_logger_do_not_say_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron gives it one, and may raise its level."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    logger.info("a line")
    output = capsys.readouterr()
    assert output.out == "megatron_tiling: a line\n" and not output.err

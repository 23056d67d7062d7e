"""What the package tells its users: one logger, ``megatron_tiling``, whose lines go to standard output."""

import logging
import os

import torch


class _Stdout(logging.Handler):
    """Writes to what is standard output at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


logger = logging.getLogger("megatron_tiling")
if not logger.handlers:
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Megatron gives the root logger a handler and a level of its own
    logger.addHandler(_Stdout())
    logger.handlers[0].setFormatter(logging.Formatter("megatron_tiling: %(message)s"))


def log_on_rank_0(message: str) -> None:
    """Also before torch.distributed is there, as where arguments are parsed."""
    started = torch.distributed.is_initialized()
    if (torch.distributed.get_rank() if started else int(os.environ.get("RANK", "0"))) == 0:
        logger.info(message)

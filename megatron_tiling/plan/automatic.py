"""``--tile-factor auto`` and ``--tiled-mlp-keep auto``: what there is to choose from, and in which order."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

from megatron_tiling.arguments import AUTOMATIC, add_tiling_args
from megatron_tiling.config import DEFAULT_FACTOR, argument_of, parse_splits

#: More tiles take less memory at once, and each takes a less efficient product. Small MLPs have one by default.
FACTORS = (1, 2, 4, 8, 16)
#: Of an MLP's tiles. What is not kept takes a product again, which costs more than more tiles do.
KEPT = (1, 0.75, 0.5, 0.25, 0)
#: Of one that goes by steps of tokens.
KEPT_IN_STEPS = (1, 0)


def automatic_flags(arguments: Sequence[str]) -> list[str]:
    """For a command that asks for it: the flags to add, the fastest first. They override those that are ``auto``.

    >>> automatic_flags(["--tile-factor", "2", "--tiled-mlp-keep", "auto"])
    ['--tiled-mlp-keep all', '--tiled-mlp-keep 1', '--tiled-mlp-keep 0']
    """
    return list(dict.fromkeys(_combinations(arguments)))


def _combinations(arguments: Sequence[str]) -> Iterator[str]:
    parser = add_tiling_args(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    asked = parser.parse_known_args(list(arguments))[0]
    factor, keep = (getattr(asked, argument_of(flag)) for flag in AUTOMATIC)
    if "auto" not in (factor, keep):
        return
    splits = parse_splits(asked.tiled_linear_splits or ())
    shares = KEPT if asked.tiled_tp_overlap in (None, "off") else KEPT_IN_STEPS
    for share, tiles in itertools.product(
        shares if keep == "auto" else [None], FACTORS if factor == "auto" else [factor or DEFAULT_FACTOR]
    ):
        flags = [f"--tile-factor {tiles}"] if factor == "auto" else []
        if share is not None:
            fewest = min(splits.get(module, (1, tiles))[1] for module in ("fc1", "experts"))
            kept = int(share * fewest)
            if share and not kept:  # so few tiles keep all or none
                continue
            flags.append(f"--tiled-mlp-keep {'all' if share == 1 else kept}")
        yield " ".join(flags)

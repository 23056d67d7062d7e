"""Settings that every rank must share, compared before the first collective that would hang over a difference."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Collective over all ranks: compare ``settings``, printable values by the name of the flag that sets them.

    Raises:
        ValueError: on every rank, if a value differs: names the flag, the values and the ranks that have the rarer one.
    """
    mine = {name: str(value) for name, value in settings.items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for name in sorted(set().union(*everyone)):
        values = [theirs.get(name, "(not set)") for theirs in everyone]
        common, _ = Counter(values).most_common(1)[0]
        odd = [f"rank {rank} has {value}" for rank, value in enumerate(values) if value != common]
        if odd:
            shown = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more differ" if len(odd) > 4 else "")
            raise ValueError(f"{name}: every rank must have the same value; most have {common}, {shown}")

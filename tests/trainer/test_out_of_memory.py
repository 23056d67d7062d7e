"""What a run says when it dies of memory, where others hold some of its GPU."""

import pytest
import torch

from megatron_tiling.trainer import out_of_memory

GIB = 2**30
ANSWER = {
    "given": {"gib": 18.5, "phase": "MLP"},
    "best": {"gib": 18.1, "flags": "--use-tiled-linear"},
    "smallest": None,
    "limit_gib": 130.4,
    "torch_gib": 136.3,
    "fragmentation": "5.9 for fragmentation (none with a setting)",
    "supposed": "",
}
BESIDE = ", beside 5.9 for fragmentation (none with a setting)"


@pytest.mark.parametrize(
    ("free", "reserved", "words"),
    [
        (1, 16, f"18.5 GiB of 130.4 (the driver, NCCL and other processes leave it 17.0){BESIDE}, set by MLP"),
        (2, 134, f"18.5 GiB of 130.4 (the driver, NCCL and other processes leave it 136.0){BESIDE}, set by MLP"),
        (2, 136, f"18.5 GiB of 130.4{BESIDE}, set by MLP. What fits best, at 18.1"),
    ],
)
def test_what_others_leave_is_said_where_it_is_less_than_planned_with(
    free: int, reserved: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * GIB)
    assert words in out_of_memory._words(ANSWER, out_of_memory._left_by_others())

"""What an offload asks of the host's memory, and when that is refused."""

import pytest

from megatron_tiling.zero3 import host_memory
from megatron_tiling.zero3.host_memory import require_host_memory


def test_offload_that_the_host_cannot_hold_is_refused_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: 40 * 2**20)
    require_host_memory({"zero_optimization": offload}, elements=2**20, element_size=2)
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: 40 * 2**20 - 1)
    with pytest.raises(ValueError) as refusal:
        require_host_memory({"zero_optimization": offload}, elements=2**20, element_size=2)
    for words in (
        f"({40 * 2**20} bytes)",
        f"({40 * 2**20 - 1} bytes) are available",
        f"4 ranks x (offload_param.device cpu 0.00 GiB ({2 * 2**20} bytes)",
        f"offload_optimizer.device cpu 0.01 GiB ({8 * 2**20} bytes)",
    ):
        assert words in str(refusal.value)
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: 0)
    require_host_memory({"zero_optimization": {"offload_param": {"device": "nvme"}}}, elements=8, element_size=2)


def test_the_host_has_memory() -> None:
    assert 0 < host_memory.available_host_memory() < 2**50

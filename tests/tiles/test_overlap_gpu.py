"""Communication beside an MLP's products on several GPUs: see check_overlap_gpu.py."""

import pytest
import torch

from tests.support.launch import torchrun

GPUS = torch.cuda.device_count()


@pytest.mark.feature("TiledMLP with communication behind products, NCCL, TP={world}")
@pytest.mark.parametrize("transport", ["auto", "collectives"])
@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_as_blocking(world: int, transport: str) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} GPUs")
    output = torchrun("-m", "tests.tiles.check_overlap_gpu", transport, world=world)
    assert f"cases have the same bits at TP={world}" in output
    if transport == "auto" and "NCCL alone" in output:
        reason = next(line for line in output.splitlines() if "no symmetric memory" in line)
        pytest.skip(f"collectives gave the right numbers, but {reason}")

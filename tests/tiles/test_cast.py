"""Casts to FP8 by a known scale: torch's, and the kernel's."""

import pytest
import torch

from megatron_tiling.tiles.cast import cast

kernels = pytest.importorskip("megatron_tiling.tiles.kernels.cast")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("rowwise, columnwise", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes, width", [((64, 64), 128), ((70,), 40), ((48, 16, 5), 200)])
def test_rows_and_columns(sizes: tuple[int, ...], width: int, rowwise: bool, columnwise: bool) -> None:
    matrix = torch.randn(300, width, device=DEVICE, dtype=torch.bfloat16)
    parts = [matrix[100 * index : 100 * index + size] for index, size in enumerate(sizes)]
    scale = torch.tensor([200.0], device=DEVICE)  # so much that some of it is beyond FP8
    expected = (torch.cat(parts).float() * scale).clamp(-448, 448).to(FP8)
    assert expected.float().abs().max() == 448
    for function in (cast, kernels.cast):
        rows = torch.zeros(expected.shape, device=DEVICE).to(FP8) if rowwise else None
        columns = torch.zeros(expected.t().shape, device=DEVICE).to(FP8) if columnwise else None
        function(parts, scale, rows, columns)
        for found in (rows, None if columns is None else columns.t()):
            if found is not None:
                same = found.float() == expected.float()
                exact = function is cast or DEVICE == "cuda"
                # Triton's interpreter rounds some to half of what they are.
                assert same.all() if exact else same.float().mean() > 0.95

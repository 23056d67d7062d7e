"""Casts to FP8 by a known scale: torch's, and the kernel's."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_tiling.tiles.cast import cast

kernels = pytest.importorskip("megatron_tiling.tiles.kernels.cast")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
layouts = pytest.mark.parametrize("rowwise, columnwise", [(True, False), (False, True), (True, True)])


@layouts
@pytest.mark.parametrize("sizes, width", [((64, 64), 128), ((70,), 40), ((48, 16, 5), 200)])
def test_rows_and_columns(sizes: tuple[int, ...], width: int, rowwise: bool, columnwise: bool) -> None:
    matrix = torch.randn(300, width, device=DEVICE, dtype=torch.bfloat16)
    check([matrix[100 * index : 100 * index + size] for index, size in enumerate(sizes)], rowwise, columnwise)


@layouts
def test_parts_of_wider_rows(rowwise: bool, columnwise: bool) -> None:
    matrix = torch.randn(100, 300, device=DEVICE, dtype=torch.bfloat16)
    check([matrix[:70, 40:120], matrix[80:, 200:280]], rowwise, columnwise)


@pytest.mark.parametrize("parts", [[torch.ones(4, 4).t()[:, :2]], [torch.ones(4, 4), torch.ones(4, 8)[:, :4]]])
def test_other_rows_are_refused(parts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="dense rows"):
        kernels.cast(parts, torch.ones(1), torch.zeros(8, 4).to(FP8), None)


def check(parts: Sequence[Tensor], rowwise: bool, columnwise: bool) -> None:
    scale = torch.tensor([200.0], device=DEVICE)  # so much that some of it is beyond FP8
    expected = (torch.cat(list(parts)).float() * scale).clamp(-448, 448).to(FP8)
    assert expected.float().abs().max() == 448
    functions: tuple[Callable[..., None], ...] = (cast, kernels.cast)
    for function in functions:
        rows = torch.zeros(expected.shape, device=DEVICE).to(FP8) if rowwise else None
        columns = torch.zeros(expected.t().shape, device=DEVICE).to(FP8) if columnwise else None
        function(parts, scale, rows, columns)
        for found in (rows, None if columns is None else columns.t()):
            if found is not None:
                same = found.float() == expected.float()
                exact = function is cast or DEVICE == "cuda"
                # Triton's interpreter rounds some to half of what they are.
                assert same.all() if exact else same.float().mean() > 0.95

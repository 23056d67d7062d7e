"""Grouped experts, stock and tiled, on stand-ins for TransformerEngine's layers: see check_experts.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiling.resident import experts
from megatron_tiling.tiles.expert_products import one_by_one
from tests.support.launch import ROOT, search_path, torchrun
from tests.support.megatron_lm import VERSIONS, Version, unpacked_wheel

SCRIPT = Path(__file__).with_name("check_experts.py")
LAYOUTS = ("EP=2", "expert TP=2", "alone")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine itself is installed"
)


@pytest.fixture(scope="module", params=(VERSIONS[0], VERSIONS[-1]), ids=lambda version: version.wheel)
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the checks with that version, whose name it begins with."""
    version: Version = request.param
    wheel = unpacked_wheel(version, tmp_path_factory.mktemp(version.wheel))
    path = search_path(ROOT / "tests" / "stand_ins", wheel)
    return f"{version.wheel}\n{torchrun(SCRIPT, world=2, environment={'PYTHONPATH': path})}"


@pytest.mark.feature("grouped experts, {layout}", version="{output.wheel}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_stock(layout: str, output: str) -> None:
    version, *_ = output.splitlines()
    assert f"experts, {layout}: checks passed on megatron-core {version}" in output, output[-6000:]


def test_stocks_own_grouped_mlp(output: str) -> None:
    """In 0.16 alone."""
    assert ("GroupedMLP: as stock" in output) == output.startswith("0.16")


def as_transformer_engine(
    a: list[Tensor], b: list[Tensor], out: list[Tensor], quantizers: list[None], dtype: torch.dtype, **options: Any
) -> None:
    """What its ``general_grouped_gemm`` does: operands in the order of columns, dense in memory."""
    assert all(tensor.is_contiguous() for tensor in (*a, *b, *out)) and len(quantizers) == len(out)
    assert options["layout"] in ("TN", "NN", "NT") and options["m_splits"] == [tensor.shape[0] for tensor in out]
    for one, other, result in zip(a, b, out, strict=True):
        left = other.t() if options["layout"][1] == "T" else other
        right = one.t() if options["layout"][0] == "T" else one
        result.copy_(left @ right + (result if options["accumulate"] else 0))


@pytest.mark.parametrize("rows", [[3, 1, 17], [0, 5, 1], [4, 4, 4], [1, 1, 1]])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_as_transformer_engine_takes_them(
    rows: list[int], accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "GROUPED_GEMM", as_transformer_engine)
    wide, narrow, weights = (
        [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
        for shapes in ([(size, 7) for size in rows], [(size, 5) for size in rows], [(7, 5) for _ in rows])
    )
    for out, a, b, layout in (
        (wide, narrow, weights, "NT"),
        (narrow, wide, weights, "NN"),
        (weights, wide, narrow, "TN"),
    ):
        results = []
        for gemm in (experts.of_transformer_engine, one_by_one):
            copies = [tensor.clone() for tensor in out]
            gemm(copies, a, b, layout, accumulate)
            results.append(copies)
        assert all(map(torch.allclose, *results))

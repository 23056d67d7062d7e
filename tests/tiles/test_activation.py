"""Activations of the tile loop: the torch path, and the Triton kernels against float64."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tiling.tiles.activation import Activation, Formula

kernels = pytest.importorskip("megatron_tiling.tiles.kernels.activation")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
}


def reference(formula: Formula, gated: bool) -> Any:
    function = FUNCTIONS[formula.kind]

    def run(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        pre = pre if bias is None else pre + bias
        if gated:
            gate, up = pre.chunk(2, -1)
            if formula.clamp is not None:
                gate, up = gate.clamp(max=formula.clamp), up.clamp(-formula.clamp, formula.clamp)
            out = function(gate) * (up + formula.linear_offset)
        else:
            out = function(pre)
        return out if scale is None else out * scale.unsqueeze(-1)

    return run


def operands(
    halves: int, rows: int, columns: int, bias: bool, scale: bool, dtype: torch.dtype, padding: int = 3
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Column slices of wider buffers: pre, bias, scale, grad."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    pre = draw(rows, halves, columns + padding).transpose(0, 1)[:, :, padding:]
    grad = draw(rows, columns + padding)[:, :columns]
    return pre, draw(halves, columns) if bias else None, draw(rows).float() if scale else None, grad


def error(found: Tensor | None, expected: Tensor | None) -> float:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return 0.0
    return float((found.double() - expected).norm() / expected.norm())


CASES = [
    *[(Formula(kind), gated) for kind in FUNCTIONS for gated in (False, True)],
    (Formula("silu", clamp=1.0), True),
    (Formula("quick_gelu", clamp=1.0, linear_offset=1.0), True),
]


@pytest.mark.parametrize("columns", [8, 515, 1040] if DEVICE == "cuda" else [515])
@pytest.mark.parametrize("bias, scale", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("formula, gated", CASES, ids=str)
def test_kernels(formula: Formula, gated: bool, bias: bool, scale: bool, columns: int) -> None:
    rows, dtype = 19, torch.bfloat16 if DEVICE == "cuda" else torch.float32
    pre, bias_, scale_, grad = operands(1 + gated, rows, columns, bias, scale, dtype)
    exact = Activation(gated, reference(formula, gated))
    wide = [None if x is None else x.double() for x in (pre, bias_, scale_, grad)]
    expected = torch.empty_like(wide[3])
    exact.forward(wide[:1], *wide[1:3], expected)
    out = torch.full_like(grad, float("nan"))
    amax, amax_of_grad = torch.zeros(2, 1, device=DEVICE)
    kernels.activate([pre], bias_, scale_, out, amax=amax, **asdict(formula))
    assert amax == out.abs().max()
    tolerance = 3e-3 if dtype == torch.bfloat16 else 1e-6
    assert error(out, expected) < tolerance
    expected_grads = exact.backward(*wide, bias_grad=bias, scale_grad=scale)
    options = {"bias_grad": bias, "scale_grad": scale, "amax": amax_of_grad} | asdict(formula)
    grads = kernels.activate_backward(pre, bias_, scale_, grad, **options)
    assert amax_of_grad == pre.abs().max()
    for found, wanted in zip((pre, grad, *grads), (wide[0], wide[3], *expected_grads), strict=True):
        assert error(found, wanted) < tolerance


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows, columns", [(80, 96), (24, 200)])
def test_the_backward_kernel_leaves_the_activation_in_fp8(gated: bool, rows: int, columns: int) -> None:
    formula, fp8 = Formula("silu"), torch.float8_e4m3fn
    pre, bias, scale, grad = operands(1 + gated, rows, columns, True, True, torch.bfloat16)
    expected_pre, expected = pre.clone(memory_format=torch.preserve_format), grad.clone()
    options = {"bias_grad": True, "scale_grad": True} | asdict(formula)
    expected_grads = kernels.activate_backward(expected_pre, bias, scale, expected, **options)
    by = torch.tensor([300.0], device=DEVICE)  # so much that some of it is beyond FP8
    expected = (expected.float() * by).clamp(-448, 448).to(fp8).t()
    found = torch.empty(columns, rows + 8, device=DEVICE).to(fp8)[:, :rows]
    untouched = grad.clone()
    grads = kernels.activate_backward(pre, bias, scale, grad, fp8=(found, by), **options)
    same = (found.float() == expected.float()).float().mean()
    assert same == 1 if DEVICE == "cuda" else same > 0.95  # Triton's interpreter rounds some to half of what they are
    assert found.float().abs().max() == expected.float().abs().max() == 448
    assert torch.equal(grad, untouched) and torch.equal(pre, expected_pre)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)

    activation, found = Activation(gated, reference(formula, gated)), torch.empty_like(found)
    pre, bias, scale, grad = operands(1 + gated, rows, columns, True, True, torch.bfloat16)
    activation.backward(pre, bias, scale, grad, fp8=(found, by), bias_grad=True, scale_grad=True)
    assert error(found, expected.double()) < 0.02


@pytest.mark.parametrize("widths", [(32, 32, 32), (48, 16), (5, 3, 30)])
@pytest.mark.parametrize("rows", [19, 300])
def test_one_launch_takes_several_parts(widths: tuple[int, ...], rows: int) -> None:
    parts = [operands(2, rows, width, False, False, torch.float32)[0] for width in widths]
    _, bias, scale, out = operands(2, rows, sum(widths), True, True, torch.float32)
    assert bias is not None
    expected, settings = torch.empty_like(out), asdict(Formula("silu", clamp=1.0, linear_offset=1.0))
    amax, expected_amax = torch.zeros(2, 1, device=DEVICE)
    kernels.activate(parts, bias, scale, out, amax=amax, **settings)
    start = 0
    for part in parts:
        columns = slice(start, start := start + part.shape[2])
        kernels.activate([part], bias[:, columns], scale, expected[:, columns], amax=expected_amax, **settings)
    assert torch.equal(out, expected) and torch.equal(amax, expected_amax)
    torch_path, found = Activation(True, reference(Formula("silu", 1.0, 1.0), True)), torch.empty_like(out)
    torch_path.forward(parts, bias, scale, found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kernels_leave_neighbours_alone() -> None:
    buffer = torch.randn(5, 2, 40, device=DEVICE)
    before, tile = buffer.clone(), buffer.transpose(0, 1)[:, :, 8:21]
    grad, settings = torch.randn(5, 13, device=DEVICE), asdict(Formula("silu"))
    kernels.activate_backward(tile, None, None, grad, bias_grad=False, scale_grad=False, **settings)
    changed = (buffer != before).any(0).any(0).nonzero().flatten().tolist()
    assert changed == list(range(8, 21))


def test_large_values_stay_finite() -> None:
    for kind in FUNCTIONS:
        pre = torch.tensor([[[-1e4, -90.0, 0.0, 90.0, 1e4]]], device=DEVICE)
        out, grad = torch.empty(1, 5, device=DEVICE), torch.ones(1, 5, device=DEVICE)
        settings = asdict(Formula(kind))
        kernels.activate([pre], None, None, out, **settings)
        kernels.activate_backward(pre, None, None, grad, bias_grad=False, scale_grad=False, **settings)
        assert out.isfinite().all() and pre.isfinite().all()
        torch.testing.assert_close(out, grad)


def test_no_tokens() -> None:
    pre, bias, scale, grad = operands(2, 0, 8, True, True, torch.float32)
    kernels.activate([pre], bias, scale, grad, **asdict(Formula("silu")))
    bias_grad, scale_grad = kernels.activate_backward(
        pre, bias, scale, grad, bias_grad=True, scale_grad=True, **asdict(Formula("silu"))
    )
    assert torch.equal(bias_grad, torch.zeros_like(bias)) and scale_grad.shape == (0,)


@pytest.mark.parametrize("gated", [False, True])
def test_torch_path(gated: bool) -> None:
    """Any function of torch, in place, with strided operands."""
    function = reference(Formula("silu"), gated)
    pre, bias, scale, grad = operands(1 + gated, 7, 10, True, True, torch.float64)
    activation, scale = Activation(gated, function), scale.double()
    leaves = [torch.cat(pre.unbind(0), -1), torch.cat(bias.unbind(0), -1), scale]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    expected = function(*leaves)
    expected.backward(grad)
    out = torch.empty_like(grad)
    amax, amax_of_grad = grad.new_zeros(2, 1, dtype=torch.float32)
    activation.forward([pre], bias, scale, out, amax)
    bias_grad, scale_grad = activation.backward(pre, bias, scale, grad, amax_of_grad, bias_grad=True, scale_grad=True)
    assert amax == out.abs().max().float() and amax_of_grad == pre.abs().max().float()
    for found, wanted in (
        *((out, expected), (grad, expected), (torch.cat(pre.unbind(0), -1), leaves[0].grad)),
        *((torch.cat(bias_grad.unbind(0), -1), leaves[1].grad), (scale_grad, leaves[2].grad)),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["expanded", "strided", "offset", "transposed"])
def test_kernels_read_bias_and_scale_of_any_layout(layout: str) -> None:
    """``PartitionedMLP`` hands over a scale with a stride."""
    pre, bias, scale, grad = operands(2, 6, 20, True, True, torch.float32)
    settings = asdict(Formula("silu"))

    def relaid(tensor: Tensor) -> Tensor:
        if layout == "expanded":
            return tensor[..., :1].expand(tensor.shape)
        if layout == "strided":
            return torch.stack([tensor, torch.full_like(tensor, 99)], dim=-1)[..., 0]
        if layout == "offset":
            return torch.cat([torch.full_like(tensor, 99), tensor], dim=-1)[..., tensor.shape[-1] :]
        return tensor.unsqueeze(0).expand(2, *tensor.shape).contiguous().movedim(0, -1)[..., 1]

    results = []
    for make in (relaid, lambda tensor: relaid(tensor).clone(memory_format=torch.contiguous_format)):
        operands_ = pre.clone(memory_format=torch.preserve_format), make(bias), make(scale)
        out, grad_ = torch.empty_like(grad), grad.clone()
        kernels.activate(operands_[:1], *operands_[1:], out, **settings)
        grads = kernels.activate_backward(*operands_, grad_, bias_grad=True, scale_grad=True, **settings)
        results.append((out, grad_, operands_[0], *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

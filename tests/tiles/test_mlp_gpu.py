"""TiledMLP on a GPU: precision of bfloat16, float32 main_grad, graph capture and torch.compile."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.resident.mlp import convert_mlp
from tests.support import harness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN, FFN, TOKENS = 256, 704, 384
SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
CHOICES = [(1, None), (3, None), (4, 0), (4, 2), (7, 0), (8, None)]
SWIGLU = {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": True}
ACTIVATIONS = {
    "swiglu": SWIGLU,
    "swiglu-bias": {**SWIGLU, "add_bias_linear": True},
    "geglu-bias": {**SWIGLU, "activation_func": F.gelu, "add_bias_linear": True},
    "gelu-bias": {"activation_func": F.gelu, "bias_activation_fusion": True, "add_bias_linear": True},
    "tanh": {"activation_func": torch.tanh},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    with harness.world_of_one("nccl"):
        model_parallel_cuda_manual_seed(1)
        yield


def stock_mlp(**options: object) -> MLP:
    settings = {"add_bias_linear": False, "gradient_accumulation_fusion": False} | options
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=2,
        params_dtype=torch.bfloat16, bf16=True, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    mlp = MLP(config, SUBMODULES, ffn_hidden_size=FFN)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return mlp


def tiled(tiles: int, keep: int | None, **options: object) -> MLP:
    mlp = stock_mlp(**options)
    mlp.linear_fc1.__class__, mlp.linear_fc2.__class__ = TiledColumnParallelLinear, TiledRowParallelLinear
    mlp.linear_fc1.set_tiles(1, tiles, fp32_accumulate=True)
    mlp.linear_fc2.set_tiles(tiles, 1, fp32_accumulate=True)
    assert convert_mlp(mlp, keep) == ""
    return mlp


def inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return hidden, torch.randn_like(hidden)


def step(mlp: torch.nn.Module, hidden: Tensor, grad_output: Tensor) -> list[Tensor]:
    hidden.grad = None
    mlp.zero_grad()
    output, bias = mlp(hidden)
    output = output if bias is None else output + bias
    output.backward(grad_output)
    return [output.detach(), hidden.grad, *(parameter.grad for parameter in mlp.parameters())]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.feature("MLP kernels")
@pytest.mark.parametrize("tiles, keep", CHOICES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_as_exact_as_stock(name: str, tiles: int, keep: int | None) -> None:
    hidden, grad_output = inputs()
    stock, mlp = stock_mlp(**ACTIVATIONS[name]), tiled(tiles, keep, **ACTIVATIONS[name])
    exact = stock_mlp(**ACTIVATIONS[name]).double()
    expected = step(exact, hidden.detach().double().requires_grad_(), grad_output.double())
    for found, dense, reference in zip(
        step(mlp, hidden, grad_output), step(stock, hidden, grad_output), expected, strict=True
    ):
        assert distance(found, reference) < 1.1 * distance(dense, reference) + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles, keep", CHOICES)
def test_main_grad(tiles: int, keep: int | None, dtype: torch.dtype) -> None:
    hidden, grad_output = inputs()
    plain, fused = tiled(tiles, keep, **SWIGLU), tiled(tiles, keep, **SWIGLU)
    for layer in (fused.linear_fc1, fused.linear_fc2):
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad = torch.zeros(layer.weight.shape, device="cuda", dtype=dtype)
    step(plain, hidden, grad_output)
    step(fused, hidden, grad_output)
    step(fused, hidden, grad_output)
    for left, right in zip(plain.parameters(), fused.parameters(), strict=True):
        assert right.grad is None
        assert distance(right.main_grad, 2 * left.grad.double()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("keep", [None, 0])
def test_zero_tokens(keep: int | None, dtype: torch.dtype | None) -> None:
    hidden, grad_output = inputs(0)
    mlp = tiled(4, keep, **SWIGLU)
    for parameter in mlp.parameters():
        if dtype is not None:
            parameter.main_grad = torch.ones(parameter.shape, device="cuda", dtype=dtype)
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.gradient_accumulation_fusion = dtype is not None
    step(mlp, hidden, grad_output)
    for parameter in mlp.parameters():
        if dtype is None:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
        else:
            assert torch.equal(parameter.main_grad, torch.ones_like(parameter.main_grad))


@pytest.mark.feature("CUDA graphs, on layers")
@pytest.mark.parametrize("tiles, keep", CHOICES)
def test_graph_capture(tiles: int, keep: int | None) -> None:
    mlp = tiled(tiles, keep, **SWIGLU)
    hidden, grad_output = inputs()
    expected = [tensor.clone() for tensor in step(mlp, hidden, grad_output)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(mlp, hidden, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(mlp, hidden, grad_output)
    for tensor in found:
        tensor.fill_(float("nan"))
    graph.replay()
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.feature("torch.compile, with a graph break, on layers")
@pytest.mark.parametrize("tiles, keep", [(3, None), (4, 0)])
def test_compile(tiles: int, keep: int | None) -> None:
    mlp = tiled(tiles, keep, **SWIGLU)
    hidden, grad_output = inputs()
    expected = step(mlp, hidden, grad_output)
    for found, wanted in zip(step(torch.compile(mlp), hidden, grad_output), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)

"""TiledMLP against Megatron's MLP, in float64 on one process."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.resident.mlp import TiledMLP, TiledSharedExpertMLP, convert_mlp
from megatron_tiling.tiles import mlp as fused_mlp
from megatron_tiling.tiles import mlp_tiles
from tests.support import harness

HIDDEN, FFN = 6, 11  # 11 features: uneven tiles for every number of tiles but 1
SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
SWIGLU = {"activation_func": F.silu, "gated_linear_unit": True}
ACTIVATIONS = {
    "swiglu": {**SWIGLU, "bias_activation_fusion": True},
    "swiglu-unfused": SWIGLU,
    "swiglu-clamp": {**SWIGLU, "activation_func_clamp_value": 0.4, "glu_linear_offset": 1.0},
    "geglu": {"activation_func": F.gelu, "gated_linear_unit": True, "bias_activation_fusion": True},
    "geglu-unfused": {"activation_func": F.gelu, "gated_linear_unit": True},
    "quick-geglu": {
        **{"activation_func": quick_gelu, "gated_linear_unit": True, "bias_activation_fusion": True},
        **{"activation_func_clamp_value": 0.4, "glu_linear_offset": 1.0},
    },
    "gelu": {"activation_func": F.gelu, "bias_activation_fusion": True},
    "gelu-unfused": {"activation_func": F.gelu},
    "squared-relu": {"activation_func": squared_relu},
    "relu": {"activation_func": F.relu},
    "silu": {"activation_func": F.silu},
}
NEEDS_SCALE, NEEDS_BIAS, REFUSES_SCALE = {"quick-geglu"}, {"gelu"}, {"geglu", "gelu"}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    stock_disable = torch._dynamo.config.disable
    torch._dynamo.config.disable = True  # Megatron's jit_fuser is torch.compile: minutes of C++ on a CPU
    with harness.world_of_one("gloo"):
        yield
    torch._dynamo.config.disable = stock_disable


def stock_config(**options: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        **{"num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2},
        **{"use_cpu_initialization": True, "params_dtype": torch.float64, "add_bias_linear": False},
        **{"gradient_accumulation_fusion": False},
    }
    return TransformerConfig(**(settings | options))


def stock_mlp(is_expert: bool = False, **options: Any) -> MLP:
    torch.manual_seed(0)
    mlp = MLP(stock_config(**options), SUBMODULES, is_expert=is_expert, ffn_hidden_size=FFN)
    for parameter in mlp.parameters():  # stock's are small, and its biases zero
        torch.nn.init.normal_(parameter, std=0.5)
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.explicit_expert_comm = is_expert  # as with expert parallelism
    return mlp


def clone(mlp: MLP) -> Any:
    """A deep copy; process groups stay shared."""
    attributes = (value for module in mlp.modules() for value in vars(module).values())
    return copy.deepcopy(mlp, {id(value): value for value in attributes if isinstance(value, dist.ProcessGroup)})


def with_tiled_layers(mlp: MLP, tiles: int, **options: Any) -> MLP:
    """A copy whose two layers are tiled."""
    mlp = clone(mlp)
    mlp.linear_fc1.__class__, mlp.linear_fc2.__class__ = TiledColumnParallelLinear, TiledRowParallelLinear
    mlp.linear_fc1.set_tiles(1, tiles, **options)
    mlp.linear_fc2.set_tiles(tiles, 1, **options)
    return mlp


def tiled(mlp: MLP, tiles: int, keep: int | None = None, **options: Any) -> TiledMLP:
    mlp = with_tiled_layers(mlp, tiles, **options)
    assert convert_mlp(mlp, keep) == ""
    assert isinstance(mlp, TiledMLP)
    return mlp


def step(mlp: MLP, tokens: tuple[int, ...] = (5, 2), scaled: bool = False, seed: int = 1) -> dict[str, Tensor | None]:
    """Output, and gradients of everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = draw(*tokens, HIDDEN).requires_grad_()
    scale = draw(*tokens).requires_grad_() if scaled else None
    output, bias = mlp(hidden) if scale is None else mlp(hidden, scale)
    mlp.zero_grad()
    loss = (output * draw(*output.shape)).sum()
    loss = loss if bias is None else loss + (bias * draw(*bias.shape)).sum()
    loss.backward()
    parameters = {name: parameter.grad for name, parameter in mlp.named_parameters()}
    return {"output": output, "bias": bias, "hidden": hidden.grad, "scale": getattr(scale, "grad", None), **parameters}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            close = torch.allclose(found[name], value, rtol=tolerance, atol=tolerance)
            assert close, f"{name}: {(found[name] - value).abs().max()} from stock"


@pytest.fixture(autouse=True)
def small_token_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_tiles, "TOKEN_MULTIPLE", 2)


class Loops:
    """Counts how often the fused loop ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        stock_forward = fused_mlp._TiledMLP.forward

        def forward(*args: Any) -> Tensor:
            self.count += 1
            return stock_forward(*args)

        monkeypatch.setattr(fused_mlp._TiledMLP, "forward", staticmethod(forward))


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Loops:
    return Loops(monkeypatch)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_stock(name: str, bias: bool, scaled: bool, loops: Loops) -> None:
    if (name in NEEDS_BIAS and not bias) or (name in NEEDS_SCALE and not scaled) or (name in REFUSES_SCALE and scaled):
        pytest.skip("stock refuses this combination")
    if name == "swiglu" and bias and scaled:
        pytest.skip("stock's weighted SwiGLU takes no bias")
    stock = stock_mlp(is_expert=scaled, add_bias_linear=bias, **ACTIVATIONS[name])
    tokens = (7,) if scaled else (5, 2)
    expected = step(stock, tokens, scaled)
    cases = [(tiles, keep) for tiles in (1, 3, 4, 8) for keep in (0, 1, None)]
    for tiles, keep in cases:
        assert_same(step(tiled(stock, tiles, keep), tokens, scaled), expected)
    assert loops.count == len(cases)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "gelu"])
def test_one_tile_kept_is_bit_for_bit_stock(name: str) -> None:
    stock = stock_mlp(add_bias_linear=name == "gelu", **ACTIVATIONS[name])
    assert_same(step(tiled(stock, 1)), step(stock), tolerance=0)


@pytest.mark.parametrize("keep", [0, 1, None])
@pytest.mark.parametrize("frozen", ["linear_fc1", "linear_fc2", "both", "all but the scale"])
def test_frozen_weights(frozen: str, keep: int | None) -> None:
    stock = stock_mlp(is_expert=True, add_bias_linear=True, **SWIGLU)
    for name in ("linear_fc1", "linear_fc2") if frozen in ("both", "all but the scale") else (frozen,):
        getattr(stock, name).weight.requires_grad_(False)
    if frozen == "all but the scale":
        stock.requires_grad_(False)
    assert_same(step(tiled(stock, 3, keep), (7,), scaled=True), step(stock, (7,), scaled=True))


def test_only_the_input_of_a_trained_weight_is_saved() -> None:
    stock = stock_mlp(**SWIGLU)
    stock.linear_fc1.weight.requires_grad_(False)
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        tiled(stock, 3)(hidden)
    assert hidden.data_ptr() not in {tensor.data_ptr() for tensor in saved}


def test_hidden_without_gradient() -> None:
    stock = stock_mlp(**SWIGLU)
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64)
    for keep in (0, 1, None):
        mlps = [clone(stock), tiled(stock, 3, keep)]
        for mlp in mlps:
            mlp(hidden)[0].sum().backward()
        for left, right in zip(*(mlp.parameters() for mlp in mlps), strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep", [0, 2, None])
def test_zero_tokens(keep: int | None) -> None:
    stock = stock_mlp(is_expert=True, add_bias_linear=True, **SWIGLU)
    assert_same(step(tiled(stock, 3, keep), (0,), scaled=True), step(stock, (0,), scaled=True))


def test_no_grad_keeps_nothing() -> None:
    mlp = tiled(stock_mlp(**SWIGLU), 3)
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    expected = mlp(hidden)[0]
    with torch.no_grad():
        output, _ = mlp(hidden)
    assert output.grad_fn is None
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep", [0, 1, None])
@pytest.mark.parametrize("name", ["swiglu", "gelu-unfused"])
def test_gradcheck(name: str, keep: int | None) -> None:
    mlp = tiled(stock_mlp(add_bias_linear=True, **ACTIVATIONS[name]), 3, keep)
    names = [name for name, _ in mlp.named_parameters()]
    hidden = torch.randn(3, 1, HIDDEN, dtype=torch.float64, requires_grad=True)

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        output, bias = torch.func.functional_call(mlp, dict(zip(names, parameters, strict=True)), (hidden,))
        return output + bias

    assert torch.autograd.gradcheck(run, (hidden, *mlp.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0, 1, None])
def test_wgrad_goes_into_main_grad(keep: int | None, dtype: torch.dtype) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3, keep)
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad = torch.ones(layer.weight.shape, dtype=torch.float64)
        layer.weight.grad_added_to_main_grad = False
    expected = {name: torch.ones_like(parameter) for name, parameter in stock.named_parameters()}
    for micro_batch in (1, 2):
        step(mlp, seed=micro_batch)
        step(stock, seed=micro_batch)
        for name, parameter in stock.named_parameters():
            expected[name] += parameter.grad
    for name, parameter in mlp.named_parameters():
        assert parameter.grad_added_to_main_grad
        torch.testing.assert_close(parameter.main_grad, expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep", [0, None])
def test_float32_main_grad_of_bfloat16_weights(keep: int | None) -> None:
    mlp = tiled(stock_mlp(**SWIGLU).bfloat16(), 3, keep)
    reference = clone(mlp).double()
    hidden = torch.randn(64, 1, HIDDEN).bfloat16()
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad = torch.zeros(layer.weight.shape)
    mlp(hidden)[0].sum().backward()
    reference(hidden.double())[0].sum().backward()
    for parameter, expected in zip(mlp.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is None
        error = (parameter.main_grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-2


def test_fp32_accumulate_rounds_the_input_gradient_once() -> None:
    stock = stock_mlp(**SWIGLU).bfloat16()
    reference = clone(stock).double()
    torch.manual_seed(2)
    hidden = torch.randn(512, 1, HIDDEN).bfloat16()
    exact = hidden.double().requires_grad_()
    reference(exact)[0].sum().backward()
    errors = {}
    for fp32 in (False, True):
        hidden = hidden.detach().requires_grad_()
        tiled(stock, 8, 0, fp32_accumulate=fp32)(hidden)[0].sum().backward()
        errors[fp32] = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert errors[True] < 0.8 * errors[False]


def test_backward_twice_through_one_graph() -> None:
    for keep in (0, 1, None):
        mlp = tiled(stock_mlp(**SWIGLU), 3, keep)
        hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
        output = mlp(hidden)[0]
        first, second = (torch.autograd.grad(output.sum(), hidden, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)


def test_second_backward_of_a_frozen_fc1_is_refused() -> None:
    stock = stock_mlp(**SWIGLU)
    stock.linear_fc1.weight.requires_grad_(False)
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    output = tiled(stock, 3)(hidden)[0].sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--tiled-mlp-keep 0"):
        output.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    stock = stock_mlp(**SWIGLU)
    mlp = tiled(stock, 3, 1)
    checkpointed = clone(mlp)
    forward = checkpointed.forward
    checkpointed.forward = lambda hidden: torch.utils.checkpoint.checkpoint(forward, hidden, use_reentrant=reentrant)
    assert_same(step(checkpointed), step(mlp), tolerance=0)


def test_shared_experts() -> None:
    config = stock_config(moe_shared_expert_intermediate_size=FFN, num_moe_experts=2, **SWIGLU)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    torch.manual_seed(0)
    stock = SharedExpertMLP(config, SUBMODULES, gate=True, pg_collection=groups)
    torch.nn.init.normal_(stock.gate_weight)
    mlp = tiled(stock, 3, 1)
    assert type(mlp) is TiledSharedExpertMLP
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(mlp(hidden), stock(hidden), rtol=1e-11, atol=1e-11)


def test_checkpoint_keys_are_stock() -> None:
    stock = stock_mlp(add_bias_linear=True, **SWIGLU)
    mlp = tiled(stock, 3)
    assert mlp.state_dict().keys() == stock.state_dict().keys()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = [module.sharded_state_dict(metadata=metadata).keys() for module in (mlp, stock)]
    assert sharded[0] == sharded[1]

"""MLPs of TransformerEngine's layers in FP8, dense and tiled around the same weights: errors, operands, amax, state."""

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import harness
from tests.support.launch import torchrun

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or importlib.util.find_spec("transformer_engine") is None
    or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU and TransformerEngine",
)

HIDDEN, FFN, SEQUENCE, BATCH = 512, 2048, 512, 2
RECIPES = ("tensorwise", "blockwise", "delayed")
SWIGLU = {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": True}
GELU = {"activation_func": F.gelu, "gated_linear_unit": False, "bias_activation_fusion": True, "add_bias_linear": True}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with harness.world_of_one("nccl"):
        model_parallel_cuda_manual_seed(1)
        yield


def stock_mlp(recipe: str, norm: bool = True, **changes: Any) -> Any:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    settings = SWIGLU | {"add_bias_linear": False, "gradient_accumulation_fusion": True} | changes
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        bf16=True,
        fp8="hybrid",
        fp8_recipe=recipe,
        fp8_amax_history_len=4,
        fp8_amax_compute_algo="max",
        **settings,
    )
    fc1 = TELayerNormColumnParallelLinear if norm else TEColumnParallelLinear
    torch.manual_seed(0)
    with get_fp8_context(config, 0, is_init=True):
        mlp = MLP(config, MLPSubmodules(linear_fc1=fc1, linear_fc2=TERowParallelLinear), ffn_hidden_size=FFN)
    for name, parameter in mlp.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.05)
            elif name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
        if parameter.dim() == 2:
            parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
            parameter.grad_added_to_main_grad = False
    return mlp


def tiled(mlp: Any, tiles: int, keep: int | None, holds_weights: bool = False) -> Any:
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.resident.fp8 import TiledFP8MLP

    reports = tile(torch.nn.ModuleDict({"mlp": mlp}), TilingConfig(tiles, mlp_keep="all" if keep is None else keep))
    assert all(report.fp8 and report.mlp == "mlp" for report in reports), reports
    assert isinstance(mlp, TiledFP8MLP)
    mlp.holds_weights = holds_weights
    return mlp


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(1)
    tensors = [
        torch.randn(SEQUENCE, BATCH, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=draw) for _ in range(2)
    ]
    scale = torch.rand(SEQUENCE * BATCH, device="cuda", generator=draw)
    return *tensors, scale


def step(mlp: Any, first: bool = True, scaled: bool = False) -> dict[str, Tensor]:
    from megatron.core.fp8_utils import get_fp8_context

    hidden, grad_output, scale = inputs()
    hidden.requires_grad_()
    if scaled:
        hidden, grad_output = hidden.detach().flatten(0, 1).requires_grad_(), grad_output.flatten(0, 1)
        scale.requires_grad_()
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        layer.is_first_microbatch = first
    for parameter in mlp.parameters():
        parameter.grad = None
        if first and hasattr(parameter, "main_grad"):
            parameter.main_grad.zero_()
    with get_fp8_context(mlp.config, 0):
        output, bias = mlp(hidden, scale) if scaled else mlp(hidden)
    total = output if bias is None else output + bias
    total.backward(grad_output)
    grads = {name: p.main_grad if p.dim() == 2 else p.grad for name, p in mlp.named_parameters()}
    if scaled:
        grads["scale"] = scale.grad
    return {"output": total.detach(), "hidden": hidden.grad, **grads}


def exact(mlp: Any, scaled: bool = False) -> dict[str, Tensor]:
    """In float64, with the weights as they are."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    hidden, grad_output, scale = inputs()
    leaves = {
        name: (p.dequantize() if isinstance(p, QuantizedTensor) else p).detach().double().requires_grad_()
        for name, p in mlp.named_parameters()
    }
    leaves |= {"hidden": hidden.double().requires_grad_(), "scale": scale.double().requires_grad_()}
    x = leaves["hidden"]
    if "linear_fc1.layer_norm_weight" in leaves:
        x = F.rms_norm(x, (HIDDEN,), leaves["linear_fc1.layer_norm_weight"], mlp.config.layernorm_epsilon)
    pre = F.linear(x, leaves["linear_fc1.weight"], leaves.get("linear_fc1.bias"))
    if mlp.config.gated_linear_unit:
        gate, up = pre.chunk(2, -1)
        activated = F.silu(gate) * up
    else:
        activated = F.gelu(pre, approximate="tanh")
    if scaled:
        activated = activated * leaves["scale"].view(SEQUENCE, BATCH, 1)
    output = F.linear(activated, leaves["linear_fc2.weight"], leaves.get("linear_fc2.bias"))
    output.backward(grad_output.double())
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double().reshape(value.shape) - value).norm() / value.norm())
        for name, value in expected.items()
    }


def assert_no_worse(found: dict[str, Tensor], dense: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    of_dense = errors(dense, expected)
    for name, error in errors(found, expected).items():
        few = expected[name].dim() == 1  # whose errors are sums over tokens, and draws of a few hundred
        assert error <= (1.2 if few else 1.05) * of_dense[name] + 1e-4, (
            f"{name}: {error:.4f}, dense {of_dense[name]:.4f}"
        )
        assert of_dense[name] < 0.2, f"{name}: dense itself {of_dense[name]:.4f}"


def warm(mlp: Any) -> None:
    """Fill the history of delayed scaling with this input's values, after those of its first scales."""
    for _ in range(6):
        step(mlp)


CASES: dict[str, dict[str, Any]] = {
    "SwiGLU": {},
    "SwiGLU, no norm": {"norm": False},
    "GELU with biases": GELU,
    "FP8 parameters": {"fp8_param": True},
}


@pytest.mark.feature("TiledMLP in FP8, {recipe}")
@pytest.mark.parametrize("tiles, keep", [(4, None), (4, 0), (8, 3), (1, None)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_against_float64_are_those_of_dense_fp8(recipe: str, case: str, tiles: int, keep: int | None) -> None:
    mlp = stock_mlp(recipe, **CASES[case])
    warm(mlp)
    dense = {name: value.clone() for name, value in step(mlp).items()}
    expected = exact(mlp)
    tiled(mlp, tiles, keep)
    warm(mlp)
    assert_no_worse(step(mlp), dense, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_whose_tokens_have_scales(recipe: str) -> None:
    mlp = stock_mlp(recipe, norm=False)
    warm(mlp)
    dense = {name: value.clone() for name, value in step(mlp, scaled=True).items()}
    tiled(mlp, 4, 2)
    warm(mlp)
    assert_no_worse(step(mlp, scaled=True), dense, exact(mlp, scaled=True))


@pytest.mark.parametrize("holds_weights", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_later_micro_batches_take_the_weights_of_the_first(recipe: str, holds_weights: bool) -> None:
    mlp = tiled(stock_mlp(recipe), 4, None, holds_weights)
    warm(mlp)
    once = {name: value.clone() for name, value in step(mlp).items()}
    twice = step(mlp, first=False)
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        assert (twice[name] - 2 * once[name]).norm() <= 0.01 * once[name].norm()
    assert torch.equal(twice["output"], once["output"])
    with torch.no_grad():
        mlp.linear_fc2.weight.mul_(0.5)
    if holds_weights:  # as dense, until the next first one
        assert torch.equal(step(mlp, first=False)["output"], once["output"])
    changed = step(mlp)["output"]
    assert (2 * changed - once["output"]).norm() <= 0.05 * once["output"].norm()


def test_delayed_scaling_keeps_the_history_of_dense() -> None:
    dense, ours = stock_mlp("delayed"), tiled(stock_mlp("delayed"), 4, 1)
    for index in range(6):
        step(dense, first=index % 3 == 0)
        step(ours, first=index % 3 == 0)
        for name in ("linear_fc1", "linear_fc2"):
            for key in ("scaling_fwd", "scaling_bwd"):
                expected, found = (getattr(mlp, name).fp8_meta[key] for mlp in (dense, ours))
                torch.testing.assert_close(found.amax_history, expected.amax_history, rtol=0.03, atol=0)
                torch.testing.assert_close(found.scale, expected.scale, rtol=0.03, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_goes_to_dense_and_back(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    ours = tiled(stock_mlp(recipe), 4, None)
    warm(ours)
    state = copy.deepcopy(ours.state_dict())
    dense = stock_mlp(recipe)
    assert list(state) == list(dense.state_dict())
    dense.load_state_dict(state)
    expected = {name: value.clone() for name, value in step(dense).items()}
    back = tiled(stock_mlp(recipe), 4, None)
    back.load_state_dict(state)
    found = step(back)
    for name, value in expected.items():
        assert (found[name].float() - value.float()).norm() <= 0.12 * value.float().norm(), name  # of FP8 twice


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_call_that_tiles_cannot_do_runs_the_layers(recipe: str) -> None:
    mlp = stock_mlp(recipe)
    warm(mlp)
    expected = step(mlp)["output"].clone()
    tiled(mlp, 4, None)
    warm(mlp)
    handle = mlp.linear_fc2.register_forward_hook(lambda *_: None)
    warm(mlp)
    assert torch.equal(step(mlp, first=False)["output"], expected)
    handle.remove()
    hidden = inputs()[0]
    assert mlp.reason_for_stock_forward() == "FP8 is off"
    with torch.no_grad():
        assert torch.isfinite(mlp(hidden)[0]).all()


def test_blocks_of_tiles_are_those_of_the_whole() -> None:
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    from megatron_tiling.resident import fp8_operands as operands

    def quantizer(dimensions: int) -> Any:
        return Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=dimensions)

    tensor = torch.randn(1024, 1920, device="cuda", dtype=torch.bfloat16)
    cuts = [slice(0, 640), slice(640, 1280), slice(1280, 1920)]
    whole = operands.quantized(quantizer(1), tensor, rowwise=True, columnwise=True)
    parts = [operands.quantized(quantizer(1), tensor[:, cut], rowwise=True, columnwise=True) for cut in cuts]
    for cut, part in zip(cuts, parts, strict=True):
        assert torch.equal(part._rowwise_data, whole._rowwise_data[:, cut])
        assert torch.equal(part._rowwise_scale_inv, whole._rowwise_scale_inv[cut.start // 128 : cut.stop // 128])
    joined = operands.joined(parts)
    assert torch.equal(joined._columnwise_data, whole._columnwise_data)
    assert torch.equal(joined._columnwise_scale_inv, whole._columnwise_scale_inv)

    weight = operands.quantized(quantizer(2), tensor, rowwise=True, columnwise=True)
    for rows in (slice(0, 256), slice(256, 1024)):
        expected = operands.quantized(quantizer(2), tensor[rows], rowwise=True, columnwise=True)
        found = operands.rows_of(weight, rows)
        found.update_usage(rowwise_usage=True, columnwise_usage=True)
        for name in ("_rowwise_data", "_columnwise_data"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        blocks = (rows.stop - rows.start) // 128  # and padding
        assert torch.equal(found._rowwise_scale_inv[:, :15], expected._rowwise_scale_inv[:, :15])
        assert torch.equal(found._columnwise_scale_inv[:, :blocks], expected._columnwise_scale_inv[:, :blocks])
    for cut in cuts:
        expected = operands.quantized(quantizer(2), tensor[:, cut], rowwise=True, columnwise=True)
        found = operands.columns_of(weight, cut)
        assert torch.equal(found._columnwise_data, expected._columnwise_data)
        assert found._columnwise_scale_inv.shape == expected._columnwise_scale_inv.shape
        assert torch.equal(found._columnwise_scale_inv[:, :8], expected._columnwise_scale_inv[:, :8])
    for rows in (slice(0, 256), slice(256, 1024)):
        expected = operands.quantized(quantizer(1), tensor[rows], rowwise=True)
        found = operands.rows_of(whole, rows)
        assert torch.equal(found._rowwise_data, expected._rowwise_data)
        assert torch.equal(found._rowwise_scale_inv, expected._rowwise_scale_inv)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_rows_of_weights_are_those_of_transformer_engine(recipe: str) -> None:
    """Bit for bit, where the values are beyond FP8 too."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    from megatron_tiling.resident.fp8_operands import WeightCopies

    def quantizer() -> Any:
        if recipe == "tensorwise":
            return Float8CurrentScalingQuantizer(DType.kFloat8E4M3, "cuda")
        return Float8Quantizer(torch.tensor(200.0, device="cuda"), torch.zeros(1, device="cuda"), DType.kFloat8E4M3)

    weight = torch.randn(1024, 528, device="cuda", dtype=torch.bfloat16)
    by, copies = quantizer(), WeightCopies(quantizer(), hold=False)
    by.internal = True
    by.set_usage(rowwise=True, columnwise=True)
    expected = by(weight)
    for ranges in ([slice(0, 1024)], [slice(208, 416), slice(720, 928)]):
        found = copies.rows(weight, ranges, columnwise=True)
        columns = copies.rows(weight, ranges, rowwise=False, columnwise=True)
        assert torch.equal(found._data, torch.cat([expected._data[rows] for rows in ranges]))
        assert torch.equal(found._transpose, torch.cat([expected._transpose[:, rows] for rows in ranges], dim=1))
        assert torch.equal(columns._transpose, found._transpose) and columns._data is None
        assert torch.equal(found._scale_inv, expected._scale_inv)
    part = slice(176, 352)
    assert torch.equal(copies.columns(weight, part)._transpose, expected._transpose[part])


@pytest.mark.feature("TiledMLP in FP8 under tensor and sequence parallelism")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_and_sequence_parallelism() -> None:
    assert "check_fp8: ok" in torchrun("-m", "tests.resident.check_fp8", world=2)

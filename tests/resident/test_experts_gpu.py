"""Tiled experts beside TransformerEngine's, in bfloat16 on a GPU: values, gradients, main_grad, memory."""

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import harness

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and TransformerEngine",
)

HIDDEN, FEATURES, EXPERTS = 256, 352, 6
SWIGLU = {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": True}
#: A large expert, one row, none, and what is no multiple of anything.
ROWS = {"uneven": [700, 1, 0, 333, 64, 90], "even": [128] * 6, "one": [0, 0, 500, 0, 0, 0], "none": [0] * 6}
CHOICES = [(1, None), (3, None), (4, 0), (4, 2), (8, 1)]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with harness.world_of_one("nccl"):
        model_parallel_cuda_manual_seed(1)
        yield


def activations() -> dict[str, dict[str, Any]]:
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    clamped = {"activation_func_clamp_value": 0.7, "glu_linear_offset": 1.0}
    return {
        "swiglu": SWIGLU,
        "swiglu, biases": SWIGLU | {"add_bias_linear": True, "bias_dropout_fusion": False},
        "quick geglu, clamped, biases": SWIGLU
        | clamped
        | {"activation_func": quick_gelu, "add_bias_linear": True, "bias_dropout_fusion": False},
        "swiglu, clamped, unfused": SWIGLU | clamped | {"bias_activation_fusion": False},
        "squared relu": {"activation_func": squared_relu, "use_fused_weighted_squared_relu": True},
        "tanh": {"activation_func": torch.tanh},  # without a kernel
    }


def stock_experts(**options: Any) -> Any:
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import experts as stock

    settings = {"add_bias_linear": False, "gradient_accumulation_fusion": False} | options
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FEATURES, moe_ffn_hidden_size=FEATURES, num_attention_heads=2,
        num_moe_experts=EXPERTS, moe_router_topk=2, params_dtype=torch.bfloat16, bf16=True, **settings,
    )  # fmt: skip
    submodules = stock.GroupedMLPSubmodules(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return with_weights(stock.TEGroupedMLP(EXPERTS, config, submodules, pg_collection=groups).cuda())


def with_weights(module: Any) -> Any:
    generator = torch.Generator(next(module.parameters()).device).manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return module


def tiled(tiles: int, keep: int | None, **options: Any) -> Any:
    from megatron_tiling import TilingConfig, tile

    experts = stock_experts(**options)
    kept: Any = "all" if keep is None else keep
    config = TilingConfig(splits={"experts": (1, tiles)}, mlp_keep=kept, fp32_accumulate=True)
    (report,) = tile(torch.nn.ModuleDict({"experts": experts}), config)
    assert report.expert_tiles == tiles, report
    return experts


def inputs(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(5)
    shape = sum(rows), HIDDEN
    hidden, grad = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2))
    return hidden, torch.rand(sum(rows), device="cuda", generator=generator), grad


def step(experts: Any, rows: list[int]) -> dict[str, Tensor]:
    hidden, probs, grad = inputs(rows)
    hidden.requires_grad_()
    probs.requires_grad_()
    experts.zero_grad()
    output, _ = experts(hidden, torch.tensor(rows), probs)
    output.backward(grad)
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad} | gradients


def exact_step(experts: Any, rows: list[int]) -> dict[str, Tensor]:
    """One expert after the other, in float64."""
    config, results = experts.config, []
    hidden, probs, grad = (tensor.double() for tensor in inputs(rows))
    hidden.requires_grad_()
    probs.requires_grad_()
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in experts.named_parameters()}
    clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
    for index, (x, scale) in enumerate(zip(hidden.split(rows), probs.split(rows), strict=True)):
        fc1, fc2 = (leaves[f"linear_fc{number}.weight{index}"] for number in (1, 2))
        pre = x @ fc1.t()
        if config.add_bias_linear:
            pre = pre + leaves[f"linear_fc1.bias{index}"]
        if config.gated_linear_unit:
            gate, up = pre.chunk(2, -1)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            pre = config.activation_func(gate) * (up + offset)
        else:
            pre = config.activation_func(pre)
        result = (pre * scale[:, None]) @ fc2.t()
        if config.add_bias_linear:
            result = result + leaves[f"linear_fc2.bias{index}"] * scale[:, None]
        results.append(result)
    output = torch.cat(results)
    output.backward(grad)
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad} | gradients


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.feature("grouped experts of TransformerEngine, {name}")
@pytest.mark.parametrize("name", activations() if importlib.util.find_spec("megatron") else ())
@pytest.mark.parametrize(("tiles", "keep"), CHOICES)
@pytest.mark.parametrize("rows", ROWS)
def test_as_exact_as_stock(rows: str, tiles: int, keep: int | None, name: str) -> None:
    options = activations()[name]
    dense, experts = stock_experts(**options), tiled(tiles, keep, **options)
    found, stock, exact = step(experts, ROWS[rows]), step(dense, ROWS[rows]), exact_step(dense, ROWS[rows])
    # Tiles keep what fc1 gives before its bias: another rounding, and near a clamp it decides on all of a gradient.
    factor = 2 if "clamped, biases" in name else 1.1
    for key, reference in exact.items():
        assert distance(found[key], reference) < factor * distance(stock[key], reference) + 1e-4, key


@pytest.mark.parametrize(("tiles", "keep"), CHOICES)
def test_main_grad_and_transformer_engines_gemm(tiles: int, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tiling.resident import experts as module

    options = SWIGLU | {"gradient_accumulation_fusion": True}
    dense, experts = stock_experts(**options), tiled(tiles, keep, **options)
    for parameter in (*dense.parameters(), *experts.parameters()):
        parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
        parameter.grad_added_to_main_grad = False
    calls = []
    gemm = module.GROUPED_GEMM
    assert gemm is not None
    monkeypatch.setattr(module, "GROUPED_GEMM", lambda *args, **kwargs: (calls.append(1), gemm(*args, **kwargs))[1])
    exact = exact_step(dense, ROWS["uneven"])
    step(experts, ROWS["uneven"])
    assert calls
    step(dense, ROWS["uneven"])
    for (name, parameter), other in zip(experts.named_parameters(), dense.parameters(), strict=True):
        limit = 1.1 * distance(other.main_grad, exact[name]) + 1e-4
        assert parameter.grad_added_to_main_grad and distance(parameter.main_grad, exact[name]) < limit, name


@pytest.mark.parametrize("rows", [[1, 1, 1], [3, 1, 17], [0, 5, 1], [64, 64, 64]])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(rows: list[int], accumulate: bool) -> None:
    """Each product of the loop, of TransformerEngine and of torch."""
    from megatron_tiling.resident.experts import of_transformer_engine
    from megatron_tiling.tiles.expert_products import one_by_one

    wide, narrow = (
        [torch.randn(size, width, device="cuda").bfloat16() for size in rows] for width in (FEATURES, HIDDEN)
    )
    weights = [torch.randn(FEATURES, HIDDEN, device="cuda").bfloat16() for _ in rows]
    for out, a, b, layout in (
        (wide, narrow, weights, "NT"),
        (narrow, wide, weights, "NN"),
        ([weight.float() for weight in weights], wide, narrow, "TN"),
        (weights, wide, narrow, "TN"),
    ):
        results = []
        for gemm in (of_transformer_engine, one_by_one):
            copies = [tensor.clone() for tensor in out]
            gemm(copies, a, b, layout, accumulate)
            results.append(torch.cat([tensor.flatten() for tensor in copies]))
        assert distance(results[0], results[1].double()) < 5e-3


@pytest.mark.parametrize("keep", [0, 2, None])
def test_what_is_kept(keep: int | None) -> None:
    """Between the passes, beside input, output and probabilities: the pre-activations of kept tiles."""
    rows = [2048] * EXPERTS
    experts = tiled(EXPERTS, keep, **SWIGLU)
    hidden, probs = inputs(rows)[:2]
    hidden.requires_grad_()
    experts(hidden, torch.tensor(rows), probs)
    gc.collect()  # what earlier tests have left
    before = torch.cuda.memory_allocated()
    output, _ = experts(hidden, torch.tensor(rows), probs)
    held = torch.cuda.memory_allocated() - before - output.nbytes
    kept = EXPERTS if keep is None else keep
    assert abs(held - kept * 2048 * 2 * FEATURES * 2) <= 2 * 2**20  # whole blocks of the allocator


def moe_layer(dispatcher: str, fused: bool) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FEATURES, moe_ffn_hidden_size=FEATURES, num_attention_heads=2,
        num_moe_experts=EXPERTS, moe_router_topk=4, moe_grouped_gemm=True, params_dtype=torch.bfloat16, bf16=True,
        add_bias_linear=False, moe_token_dispatcher_type=dispatcher, moe_permute_fusion=fused, **SWIGLU,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=True, num_experts=EXPERTS, moe_grouped_gemm=True)
    return with_weights(spec(config=config).cuda())


@pytest.mark.feature("grouped experts of TransformerEngine, tokens kept once: {dispatcher}")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_tokens_are_kept_once(dispatcher: str, fused: bool) -> None:
    from megatron_tiling import TilingConfig, tile

    results, held = [], []
    for tiled_too in (False, True):
        layer = moe_layer(dispatcher, fused)
        if tiled_too:
            (report,) = [one for one in tile(layer, TilingConfig(mlp_keep=0)) if one.experts]
            assert report.gathers_rows
        generator = torch.Generator("cuda").manual_seed(5)
        hidden, grad = (torch.randn(4096, 1, HIDDEN, device="cuda", generator=generator).bfloat16() for _ in range(2))
        hidden.requires_grad_()
        for _ in range(2):
            layer.zero_grad()
            hidden.grad = None
            before = torch.cuda.memory_allocated()
            output, _ = layer(hidden)
            held.append(torch.cuda.memory_allocated() - before)
            output.backward(grad)
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([output.detach(), hidden.grad, *gradients])
    assert layer.token_dispatcher.is_known
    for found, expected in zip(*reversed(results), strict=True):
        assert distance(found, expected.double()) < 2e-2
    rows = 4096 * 4 * HIDDEN * 2
    assert held[1] - held[3] > rows  # and the intermediates besides


RECIPES = ("tensorwise", "blockwise", "delayed")


def fp8_experts(recipe: str, tiles: int | None, keep: int | None) -> Any:
    """Stock, or in so many tiles."""
    from megatron.core.fp8_utils import get_fp8_context

    options = SWIGLU | {"fp8": "hybrid", "fp8_recipe": recipe, "gradient_accumulation_fusion": True}
    options |= {"fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
    experts = stock_experts(**options) if tiles is None else tiled(tiles, keep, **options)
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
        parameter.grad_added_to_main_grad = False
    experts.context = lambda: get_fp8_context(experts.config, 0)
    return experts


def fp8_step(experts: Any, rows: list[int], first: bool) -> dict[str, Tensor]:
    hidden, probs, grad = inputs(rows)
    hidden.requires_grad_()
    probs.requires_grad_()
    for layer in (experts.linear_fc1, experts.linear_fc2):
        layer.is_first_microbatch = first
    for parameter in experts.parameters() if first else ():
        parameter.main_grad.zero_()
    with experts.context():
        output, _ = experts(hidden, torch.tensor(rows), probs)
    output.backward(grad)
    gradients = {name: parameter.main_grad.clone() for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad} | gradients


@pytest.mark.feature("grouped experts in FP8, {recipe}")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tiles", "keep"), CHOICES)
@pytest.mark.parametrize("rows", ROWS)
def test_fp8_as_exact_as_stock(rows: str, tiles: int, keep: int | None, recipe: str) -> None:
    """Errors against float64, two micro-batches a step; histories after it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    exact = exact_step(stock_experts(**SWIGLU), ROWS[rows])
    results, notes = [], []
    for count in (None, tiles):
        FP8GlobalStateManager.reset()
        experts = fp8_experts(recipe, count, keep)
        for number in range(4):
            found = fp8_step(experts, ROWS[rows], first=number % 2 == 0)
        results.append(found)
        if count is not None:
            assert set(experts._copies) == {"linear_fc1", "linear_fc2"}  # the loop has run
        metas = [layer.fp8_meta for layer in (experts.linear_fc1, experts.linear_fc2)] if recipe == "delayed" else []
        notes.append([meta[key].amax_history.clone() for meta in metas for key in ("scaling_fwd", "scaling_bwd")])
    stock, found = results
    for name, reference in exact.items():
        reference = 2 * reference if "weight" in name else reference  # two micro-batches
        limit = 1.05 * distance(stock[name], reference) + 1e-3
        assert distance(found[name], reference) < limit, name
    for one, other in zip(*notes, strict=True):
        torch.testing.assert_close(other, one, rtol=0.05, atol=1e-3)

"""Models on the real TransformerEngine, dense and tiled around the same weights: losses, gradients, state dicts."""

import importlib.util
import os
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

SEQUENCE, BATCH, WORDS = 256, 2, 1024
LLAMA = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "num_query_groups": 2,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 128, "moe_router_dtype": "fp32"}
GROUPED = EXPERTS | {"moe_grouped_gemm": True, "moe_shared_expert_intermediate_size": 128}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16, "v_head_dim": 32}
FP8 = {"fp8": "hybrid"}
#: Changes of Llama's config.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "zero-centered norms": {"layernorm_zero_centered_gamma": True},
    "GPT with biases": {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "activation_func": F.gelu,
        "bias_activation_fusion": True,
    },
    "QK norms": {"qk_layernorm": True},
    "multi-latent attention": LATENT | {"multi_latent_attention": True, "num_query_groups": 4},
    "next-token heads": {"mtp_num_layers": 1},
    "sequential experts": EXPERTS,
    "grouped and shared experts": GROUPED,
    "shared experts, overlapped": GROUPED
    | {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "float32": {"bf16": False, "params_dtype": torch.float32},
}
#: TransformerEngine multiplies float32 in TF32. A token close to two experts goes to the other after a rounding.
LIMITS = {
    "float32": 2e-3,
    "sequential experts": 0.2,
    "grouped and shared experts": 0.2,
    "shared experts, overlapped": 0.2,
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    with harness.world_of_one("nccl"):
        yield


def gpt(attention: str = "unfused", **changes: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    for backend in ("FLASH", "FUSED", "UNFUSED"):  # Megatron sets them once a process
        os.environ.pop(f"NVTE_{backend}_ATTN", None)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(11)
    latent = changes.get("multi_latent_attention", False)
    settings = LLAMA | {"bf16": True, "params_dtype": torch.bfloat16} | changes
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=704,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend[attention],
        **settings,
    )
    fuses = config.use_transformer_engine_op_fuser
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        use_te_op_fuser=fuses,
    )
    heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=True) if config.mtp_num_layers else None
    model = GPTModel(
        config,
        layer,
        WORDS,
        SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=heads,
    ).cuda()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs() -> dict[str, Any]:
    tokens = torch.randint(0, WORDS, (BATCH, SEQUENCE), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": None, "labels": tokens.roll(-1, 1)}


def step(model: Any, **batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**(batch or inputs())).float().mean()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach()} | {name: grad.float() for name, grad in grads.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 2.5e-2) -> None:
    assert found.keys() == expected.keys()
    assert abs(found["loss"] - expected["loss"]) <= min(limit, 1e-3) * expected["loss"]
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error <= limit, f"{name}: {float(error):.1e}"


@pytest.mark.feature("models on TransformerEngine: {name}")
@pytest.mark.parametrize("keep", [None, 0])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_dense(name: str, keep: int | None) -> None:
    from megatron_tiling import TilingConfig, tile

    dense, tiled = gpt(**MODELS[name]), gpt(**MODELS[name])
    tiled.load_state_dict(dense.state_dict())
    before = {key: id(parameter) for key, parameter in tiled.named_parameters()}
    reports = tile(tiled, TilingConfig(4, modules="all", mlp_keep=keep))
    assert any(report.grid for report in reports)
    assert {key: id(parameter) for key, parameter in tiled.named_parameters()} == before
    assert_close(step(tiled), step(dense), LIMITS.get(name, 2.5e-2))
    assert list(tiled.state_dict()) == list(dense.state_dict())
    tiled.load_state_dict(dense.state_dict())
    dense.load_state_dict(tiled.state_dict())


@pytest.mark.feature("packed sequences, on TransformerEngine")
def test_packed_sequences() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_tiling import TilingConfig, tile

    ends = torch.tensor([0, 100, 180, 2 * SEQUENCE], dtype=torch.int32, device="cuda")
    packed = PackedSeqParams("thd", ends, ends, ends, ends, 2 * SEQUENCE - 180, 2 * SEQUENCE - 180)
    batch = {name: None if value is None else value.reshape(1, -1) for name, value in inputs().items()}
    batch["packed_seq_params"] = packed
    dense, tiled = gpt(), gpt()
    tiled.load_state_dict(dense.state_dict())
    tile(tiled, TilingConfig(4, modules="all"))
    assert_close(step(tiled, **batch), step(dense, **batch))


#: By name: an option of the model's config that tiles do not honour, the modules that stay TransformerEngine's for it,
#: and words of the reason.
STAYS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "default modules": ({}, {"qkv", "proj"}, "not in --tiled-linear-modules"),
    "`--fp8-format`, tensorwise": (FP8 | {"fp8_recipe": "tensorwise"}, {"qkv", "proj"}, "--fp8-format hybrid: "),
    "`--fp8-format`, delayed": (FP8 | {"fp8_recipe": "delayed"}, {"qkv", "proj"}, "--fp8-format hybrid: "),
    "`--offload-modules core_attn attn_proj`": (
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "attn_proj"]},
        {"proj"},
        "--offload-modules ['core_attn', 'attn_proj']: ",
    ),
    "`--symmetric-ar-type`": (
        {"symmetric_ar_type": "one_shot"},
        {"proj", "fc2"},
        "--symmetric-ar-type one_shot: ",
    ),
    "`--use-transformer-engine-op-fuser`": (
        {"use_transformer_engine_op_fuser": True},
        {"fc1", "fc2"},
        "--use-transformer-engine-op-fuser: ",
    ),
}


@pytest.mark.feature("layers left to TransformerEngine: {name}")
@pytest.mark.parametrize("name", STAYS)
def test_what_tiles_do_not_honour_stays_and_the_rest_is_tiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tiling import TilingConfig, tile

    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    settings, modules, words = STAYS[name]
    dense, tiled = gpt(**settings), gpt(**settings)
    tiled.load_state_dict(dense.state_dict())
    reports = tile(tiled, TilingConfig(4, modules=None if name == "default modules" else "all"))
    assert {report.module for report in reports if report.grid is None} == modules
    assert all(report.reason.startswith(words) for report in reports if report.module in modules)
    assert next(report for report in reports if report.name == "output_layer").loss_tiles is not None
    # FP8 gradients have two bits of mantissa: a rounding, or a tile's own scale, moves some of them to the next number.
    assert_close(step(tiled), step(dense), 0.3 if "fp8" in settings else 2.5e-2)
    assert list(tiled.state_dict()) == list(dense.state_dict())


@pytest.mark.parametrize("bias", [False, True])
def test_a_norms_output_is_returned_when_asked(bias: bool) -> None:
    """As TransformerEngine's layers do, when asked after construction; with its gradient.

    Gathered or not is the same on one rank. TransformerEngine 2.17.1 and 2.20.2 drop the gradient of a gathered norm's
    output, which is then no reference.
    """
    from megatron_tiling import TilingConfig, tile

    name = "GPT with biases" if bias else "zero-centered norms"
    dense, tiled = gpt(**MODELS[name]), gpt(**MODELS[name])
    tiled.load_state_dict(dense.state_dict())
    tile(tiled, TilingConfig(4, modules="all"))
    for path in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        expected = _with_norm(dense, path, gathered=False)
        for gathered in (False, True):
            found = _with_norm(tiled, path, gathered)
            for ours, stock in zip(found, expected, strict=True):
                assert ours.shape == stock.shape
                assert (ours.float() - stock.float()).norm() <= 2.5e-2 * stock.float().norm()


def _with_norm(model: Any, path: str, gathered: bool) -> list[Tensor]:
    """Output, norm's output, bias if returned; gradients of the input and of the parameters."""
    layer = model.decoder.layers[0].get_submodule(path)
    layer.return_layernorm_output, layer.return_layernorm_output_gathered = True, gathered
    layer.zero_grad()
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(SEQUENCE, BATCH, 256, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    returned = layer(x)
    output, normed = (returned[0], returned[2]) if layer.te_return_bias else returned[0]
    (output.float().square().mean() + normed.float().pow(3).mean()).backward()
    biases = [] if returned[1] is None else [returned[1]]
    return [output, normed, *biases, x.grad, layer.layer_norm_weight.grad, layer.weight.grad]

"""Whole models, dense and tiled in place: the same outputs, gradients, parameters and checkpoint entries.

torchrun --standalone --nproc-per-node 2 -m tests.check_models
"""

import copy
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_tiling import TilingConfig, tile, tiled_model_provider, tiling_hook
from megatron_tiling.report import LayerReport, table
from megatron_tiling.resident import lm_head  # by module: functions here named check_ are run
from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.spec import TiledSpecProvider
from tests.support.harness import Counter, megatron, relative_error

TP = int(os.environ.get("WORLD_SIZE", "1"))
VOCABULARY, SEQUENCE, BATCH = 64, 12, 2
LINEARS_ONLY = TilingConfig(factor=3, modules=("qkv", "proj", "fc1", "fc2"))


def make_config(**changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "tensor_model_parallel_size": TP,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**(settings | changes))


def gpt(config: TransformerConfig | None = None, **options: Any) -> GPTModel:
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(11)
    config = config or make_config()
    spec = options.pop("spec", None) or get_gpt_layer_local_spec(normalization=config.normalization)
    return GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, **options)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None],
        "labels": tokens.roll(-1, 1),
    }


def step(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    loss = model(**inputs)
    loss.mean().backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], limit: float = 5e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= limit, f"{name}: relative error {error:.1e}"


def by_name(reports: list[LayerReport]) -> dict[str, str]:
    return {
        report.name: str(report.grid or report.expert_tiles) if report.is_tiled else f"dense: {report.reason}"
        for report in reports
    }


def check_in_place() -> None:
    """Nothing is drawn, copied or renamed; the checkpoint entries are stock's."""
    dense, tiled = gpt(), gpt()
    parameters, state = dict(tiled.named_parameters()), torch.get_rng_state()
    reports = tile(tiled, LINEARS_ONLY)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter is parameters[name] for name, parameter in tiled.named_parameters())
    grids = by_name(reports)
    assert grids["decoder.layers.1.mlp.linear_fc2"] == "3x1"
    assert grids["decoder.layers.0.self_attention.linear_qkv"] == "1x3"
    assert grids["output_layer"] == "dense: not in --tiled-linear-modules"
    assert "decoder.layers.*.mlp.linear_fc1" in table(reports)
    assert isinstance(tiled.decoder.layers[0].mlp.linear_fc1, TiledColumnParallelLinear)
    assert isinstance(tiled.decoder.layers[0].mlp.linear_fc2, TiledRowParallelLinear)
    with Counter() as counter:
        tiled_step = step(tiled, **batch())
    assert_same(tiled_step, step(dense, **batch()))
    assert counter.gemms > 0
    assert list(tiled.state_dict()) == list(dense.state_dict())
    for (key, entry), (other_key, other) in zip(
        tiled.sharded_state_dict().items(), dense.sharded_state_dict().items(), strict=True
    ):
        assert key == other_key
        for attribute in ("key", "global_shape", "global_offset", "local_shape", "replica_id"):
            assert getattr(entry, attribute, None) == getattr(other, attribute, None), (key, attribute)
    again = by_name(tile(tiled, LINEARS_ONLY))
    assert again["decoder.layers.1.mlp.linear_fc2"] == "3x1"


def check_hooks() -> None:
    """The two ways in for scripts that build models themselves."""
    (model,) = tiling_hook(LINEARS_ONLY)([gpt()])
    assert isinstance(model.decoder.layers[0].mlp.linear_fc1, TiledColumnParallelLinear)
    provider = tiled_model_provider(lambda pre_process=True, post_process=True: gpt(), LINEARS_ONLY)
    assert isinstance(provider(pre_process=True).decoder.layers[0].mlp.linear_fc1, TiledColumnParallelLinear)


def check_refusals() -> None:
    """A grid that does not fit names layer, number, limit and flag, and changes no layer."""
    for config, words in (
        (TilingConfig(factor=300, modules="all"), ("--tile-factor 300", "linear_proj", "in_splits=300")),
        (
            TilingConfig(splits={"fc2": (41, 1)}),
            ("--tiled-linear-splits fc2=41x1", "linear_fc2", "in_splits=41", str(40 // TP)),
        ),
    ):
        model = gpt()
        try:
            tile(model, config)
        except ValueError as error:
            assert all(word in str(error) for word in words), str(error)
        else:
            raise AssertionError(f"{config} was not refused")
        assert not any(isinstance(module, TiledColumnParallelLinear) for module in model.modules())
    config = make_config()
    options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
    row = {"input_is_parallel": False, "skip_bias_add": False}
    column, row_layer = TiledColumnParallelLinear, TiledRowParallelLinear
    parallel = row | {"input_is_parallel": True}
    apart = {"combine_out_splits": False}
    x = torch.randn(2, 8)
    for build, words in (
        (lambda: column(8, 8, gather_output=True, **apart, **options), "gather_output=True"),
        (lambda: column(8, 8, **apart, **options)(x, runtime_gather_output=True), "combine_out_splits=False"),
        (lambda: column(8, 8, out_splits=2, **options)([x]), "takes one tensor"),
        (lambda: row_layer(8, 8, **apart, **row, **options), "must combine_out_splits"),
        (lambda: row_layer(8, 8, in_splits=2, **row, **options)([x, x]), "input_is_parallel=True"),
        (
            lambda: row_layer(8, 8, in_splits=2, **parallel, **options)([x, x, x]),
            "split into 3 parts, but the layer has in_splits=2",
        ),
    ):
        expect_error(build, words)
    sharded = ColumnParallelLinear(8, 8, **options)
    sharded.gtp_remat_size = 2
    expect_error(
        lambda: tile(torch.nn.ModuleDict({"linear_fc1": sharded}), TilingConfig()),
        "--tensor-parallel-num-weight-shards",
    )
    config.defer_embedding_wgrad_compute = True
    expect_error(lambda: TiledColumnParallelLinear(8, 8, **options), "--defer-embedding-wgrad-compute")


def expect_error(build: Callable[[], Any], words: str) -> None:
    try:
        build()
    except ValueError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {words}")


def check_lists_between_layers() -> None:
    """fc1's list of out-tiles goes into fc2 as its list of in-tiles; for a gated MLP each is [gate_i | up_i]."""
    config = make_config(gated_linear_unit=True, add_bias_linear=False)
    features = 40
    options: dict[str, Any] = {
        "config": config,
        "init_method": torch.nn.init.normal_,
        "bias": False,
        "skip_bias_add": True,
    }
    torch.manual_seed(0)
    fc1 = TiledColumnParallelLinear(
        32,
        2 * features,
        gather_output=False,
        stride=2,
        tp_comm_buffer_name="fc1",
        out_splits=3,
        combine_out_splits=False,
        **options,
    )
    fc2 = TiledRowParallelLinear(features, 32, input_is_parallel=True, in_splits=3, **options)
    x = torch.randn(SEQUENCE, BATCH, 32)
    torch.distributed.broadcast(x, 0)
    tiles, _ = fc1(x)
    assert [tile.shape[-1] for tile in tiles] == [2 * fc2.grid.in_size(i) for i in range(3)]
    hidden = [torch.nn.functional.silu(gate) * up for gate, up in (tile.chunk(2, -1) for tile in tiles)]
    output, _ = fc2(hidden)
    gate, up = (x @ fc1.weight.t()).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up) @ fc2.weight.t()
    torch.distributed.all_reduce(expected)
    assert relative_error(output, expected) < 1e-5


def check_generation() -> None:
    """Prefill and two decoding steps with a KV cache give dense's logits."""
    logits = []
    for tiled in (False, True):
        model = gpt().eval()
        if tiled:
            tile(model, TilingConfig(factor=3, modules="all"))
        inputs = batch()
        inputs.pop("labels")
        context = StaticInferenceContext(BATCH, SEQUENCE)
        outputs = []
        for start, stop in ((0, SEQUENCE - 2), (SEQUENCE - 2, SEQUENCE - 1), (SEQUENCE - 1, SEQUENCE)):
            with torch.no_grad():
                outputs.append(
                    model(
                        inputs["input_ids"][:, start:stop],
                        inputs["position_ids"][:, start:stop],
                        inputs["attention_mask"][:, :, start:stop, :stop],
                        inference_context=context,
                        runtime_gather_output=True,
                    )
                )
            context.sequence_len_offset += stop - start
        logits.append(torch.cat([output.float() for output in outputs], 1))
    assert relative_error(*reversed(logits)) < 1e-5


def check_hybrid() -> None:
    """Attention and MLP layers of a HybridModel; Mamba layers and stock's final norm need CUDA packages."""
    if importlib.util.find_spec("megatron.core.models.hybrid") is None:
        print("not run: this megatron-core has no hybrid model (0.16 and 0.17 call theirs Mamba)")
        return
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    hybrid_block.TENorm = WrappedTorchNorm
    layer = get_gpt_layer_local_spec()
    attention, mlp = copy.copy(layer.submodules), copy.copy(layer.submodules)
    attention.mlp = attention.pre_mlp_layernorm = IdentityOp
    mlp.self_attention = mlp.input_layernorm = IdentityOp
    attention.mlp_bda, mlp.self_attn_bda = IdentityFuncOp, IdentityFuncOp
    stack = ModuleSpec(
        hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
        ),
    )
    results = []
    for tiled in (False, True):
        torch.manual_seed(3)
        model = HybridModel(make_config(), stack, VOCABULARY, SEQUENCE, hybrid_layer_pattern="*-")
        if tiled:
            assert lm_head.check_head(model, TilingConfig()) == ""
            grids = by_name(tile(model, LINEARS_ONLY))
            assert grids["decoder.layers.0.self_attention.linear_qkv"] == "1x3"
            assert grids["decoder.layers.1.mlp.linear_fc2"] == "3x1"
        results.append(step(model, **batch()))
    assert_same(*reversed(results))


def check_what_stays_dense() -> None:
    """Down-projections of latent attention, and whatever is no stock layer, with the reason."""
    options: dict[str, Any] = {"config": make_config(), "init_method": torch.nn.init.normal_, "bias": False}

    class Grouped(torch.nn.Linear):
        """Stands for grouped-GEMM experts."""

    model = torch.nn.ModuleDict(
        {
            "linear_kv_down_proj": ColumnParallelLinear(8, 8, **options),
            "linear_kv_up_proj": ColumnParallelLinear(8, 8, **options),
            "experts": torch.nn.ModuleDict({"linear_fc1": Grouped(4, 6)}),
            "embedder": RowParallelLinear(8, 8, input_is_parallel=True, skip_bias_add=True, **options),
        }
    )
    assert by_name(tile(model, TilingConfig(factor=2, modules="all"))) == {
        "linear_kv_down_proj": "dense: multi-latent attention needs the stock class here",
        "linear_kv_up_proj": "1x2",
        "experts.linear_fc1": "dense: Grouped is not a stock column or row layer",
        "embedder": "dense: not one of the modules that are tiled",
    }


def check_spec_provider() -> None:
    """A spec rewritten by TiledSpecProvider builds the same model, tiled."""
    spec = TiledSpecProvider(factor=2, modules="all").tiled(get_gpt_layer_local_spec())
    tiled = gpt(spec=spec)
    assert str(tiled.decoder.layers[0].mlp.linear_fc2.grid) == "2x1"
    assert_same(step(tiled, **batch()), step(gpt(), **batch()))


def check_copies() -> None:
    """A deep copy of a tiled layer computes with its own weight."""
    layer = gpt().decoder.layers[0].mlp.linear_fc2
    group, layer.tp_group = layer.tp_group, None
    twin = copy.deepcopy(layer)
    twin.tp_group = layer.tp_group = group
    torch.nn.init.zeros_(twin.weight)
    x = torch.randn(3, 1, 40 // TP)
    assert twin(x)[0].abs().sum() == 0 and layer(x)[0].abs().sum() > 0


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        checks = [check for name, check in globals().items() if name.startswith("check_")]
        for check in checks:
            check()
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            print(f"{len(checks)} model checks passed at TP={TP}")


if __name__ == "__main__":
    main()

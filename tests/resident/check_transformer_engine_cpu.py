"""Models of the real TransformerEngine, without a GPU: they are built, tiled, saved and loaded; none of them can run.

Their norms do, on torch's functions.

python -m tests.resident.check_transformer_engine_cpu FOLDER, one process, with an empty libcuda.so.1 in FOLDER, which
TransformerEngine wants to load as it is imported. Never where there is a driver.
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_tiling import cpu


def prepare(folder: Path) -> None:
    """What importing and building TransformerEngine's layers takes without a driver."""
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    cpu.install(train=False)
    torch.cuda.is_available = lambda: True  # its linear layers refuse to be built otherwise
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}


def models() -> dict[str, dict[str, Any]]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from tests.support.te_models import EXPERTS, LLAMA

    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
    return {
        "Llama": LLAMA,
        "GPT with biases, tied": {"share": True},
        "QK norms": LLAMA | {"qk_layernorm": True},
        "next-token heads": LLAMA | {"mtp_num_layers": 1},
        "sequential and shared experts": EXPERTS,
        "grouped and shared experts": EXPERTS | {"moe_grouped_gemm": True},
        "multi-latent attention": LLAMA | latent | {"config_class": MLATransformerConfig, "num_query_groups": 4},
    }


def build(share: bool = False, config_class: Any = None, seed: int = 3, **changes: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
    }
    config = (config_class or TransformerConfig)(**(settings | changes))
    spec = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts,
        config.moe_grouped_gemm,
        config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True) if config.mtp_num_layers else None
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return GPTModel(
        config,
        spec,
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=share,
        mtp_block_spec=mtp,
    )


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Two state dicts; extra states are tensors, or None where TransformerEngine has none."""
    pairs = [(one[key], other[key]) for key in one]
    same = all(a is b is None or (torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b)) for a, b in pairs)
    return list(one) == list(other) and same


def check_models() -> None:
    """The same parameters, state dicts and checkpoint entries; each loads the other's."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.resident.experts import TiledExperts
    from megatron_tiling.resident.transformer_engine import TILED_CLASSES
    from tests.support.te_models import entries

    for name, changes in models().items():
        dense, tiled = build(**changes), build(**changes)
        before = {key: id(parameter) for key, parameter in tiled.named_parameters()}
        tile(tiled, TilingConfig(factor=2, modules="all"))
        assert {key: id(parameter) for key, parameter in tiled.named_parameters()} == before, name
        left = [path for path, module in tiled.named_modules() if type(module) in TILED_CLASSES]
        assert all(path.endswith("eh_proj") for path in left), left  # of next-token heads: no module that is tiled
        experts = [module for module in tiled.modules() if isinstance(module, TiledExperts)]
        assert len(experts) == (2 if "moe_grouped_gemm" in changes else 0)
        assert not any(one.reason_in_layers() for one in experts)
        assert equal(tiled.state_dict(), dense.state_dict()), name
        assert entries(tiled) == entries(dense), name
        saved = build(**changes, seed=4).state_dict()
        tiled.load_state_dict(saved)
        assert equal(tiled.state_dict(), saved), name
        saved = build(**changes, seed=5).state_dict()
        tiled.load_state_dict(saved)
        dense.load_state_dict(tiled.state_dict())
        assert equal(dense.state_dict(), saved), name
        print(f"{name}: as dense", flush=True)


def check_checkpoints() -> None:
    """torch_dist checkpoints of dense are loaded tiled, and tiled ones dense."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_tiling import TilingConfig, tile

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for name in ("GPT with biases, tied", "sequential and shared experts", "grouped and shared experts"):
        changes = models()[name]
        for saves, loads in ((False, True), (True, False)):
            source, target = build(**changes), build(**changes, seed=4)
            for model, is_tiled in ((source, saves), (target, loads)):
                if is_tiled:
                    tile(model, TilingConfig(factor=2, modules="all"))
            assert not equal(source.state_dict(), target.state_dict())
            with tempfile.TemporaryDirectory() as folder:
                dist_checkpointing.save(source.sharded_state_dict(metadata=metadata), folder)
                loaded = dist_checkpointing.load(target.sharded_state_dict(metadata=metadata), folder)
            target.load_state_dict(loaded)
            assert equal(source.state_dict(), target.state_dict()), name
    print("checkpoints: as dense", flush=True)


def check_reasons() -> None:
    """What a layer knows of its options has the names that megatron_tiling reads."""
    from megatron.core.extensions.transformer_engine import TEQuantizationParams
    from megatron.core.quantization.quant_config import RecipeConfig

    from megatron_tiling import TilingConfig, tile
    from tests.check_models import by_name
    from tests.support.te_models import LLAMA

    recipe = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
    matcher = {"config": "bf16", "type": "glob", "pattern": "*.layers.0.*linear_fc1", "enabled": True}
    quantized = build(
        **LLAMA, quant_recipe=RecipeConfig.from_config_dict({"configs": {"bf16": recipe}, "matchers": {"fc1": matcher}})
    )
    grids = by_name(tile(quantized, TilingConfig(factor=2)))
    first, second = (quantized.decoder.layers[index].mlp.linear_fc1 for index in (0, 1))
    assert isinstance(first.te_quant_params, TEQuantizationParams) and second.te_quant_params is None
    assert grids["decoder.layers.0.mlp.linear_fc1"].startswith("dense: --te-precision-config-file: ")
    assert grids["decoder.layers.1.mlp.linear_fc1"] == "1x2"
    overlaps = {"ub_overlap_ag_fprop", "ub_overlap_rs_fprop", "ub_overlap_rs_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad"}
    assert overlaps <= {name for name, value in vars(first).items() if value is False}
    for settings, words, count in (
        ({"fp8": "hybrid", "ffn_hidden_size": 40}, "dense: --fp8-recipe delayed: 40 features make no 2 tiles", 4),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, "dense: --fp8-recipe mxfp8: ", 4),
        ({"symmetric_ar_type": "one_shot"}, "dense: --symmetric-ar-type one_shot: ", 2),
    ):
        grids = by_name(tile(build(**LLAMA, **settings), TilingConfig(factor=2)))
        assert sum(grid.startswith(words) for grid in grids.values()) == count, grids
        assert grids["output_layer"] == "1x2"
    print("reasons: as in options", flush=True)


def check_fp8() -> None:
    """MLPs in FP8 are tiled over layers that stay; those that the model's first and last layers leave out, in bf16."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import table
    from megatron_tiling.resident import fp8
    from megatron_tiling.resident.experts import TiledTEGroupedMLP
    from megatron_tiling.resident.fp8_experts import TiledFP8GroupedMLP
    from megatron_tiling.resident.mlp import TiledMLP
    from tests.support.te_models import EXPERTS, LLAMA

    fp8.is_non_tn_fp8_gemm_supported = lambda: False  # there is no GPU to ask
    settings = {"fp8": "hybrid", "fp8_recipe": "blockwise", "ffn_hidden_size": 512, "bf16": True}
    settings |= {"params_dtype": torch.bfloat16, "num_layers": 4}
    bf16_ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    dense, tiled = (build(**LLAMA | settings, **bf16_ends) for _ in range(2))
    before = [type(layer.mlp.linear_fc1) for layer in tiled.decoder.layers]
    reports = tile(tiled, TilingConfig(factor=2, mlp_keep=1))
    mlps = [layer.mlp for layer in tiled.decoder.layers]
    assert [type(mlp) for mlp in mlps] == [TiledMLP, fp8.TiledFP8MLP, fp8.TiledFP8MLP, TiledMLP]
    assert all(type(mlp.linear_fc1) is kind for mlp, kind in zip(mlps[1:3], before[1:3], strict=True))
    assert equal(tiled.state_dict(), dense.state_dict())
    notes = table(reports)
    assert notes.count("TiledMLP in FP8, keep 1\n") == 2 and notes.count("TiledMLP, keep 1, at most 2 token steps") == 2
    assert table(tile(tiled, TilingConfig(factor=2, mlp_keep=1))) == notes
    experts = build(**EXPERTS | settings | {"moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256})
    tile(experts, TilingConfig(factor=2))
    kinds = [type(module) for module in experts.modules() if isinstance(module, fp8.TiledFP8MLP)]
    assert fp8.TiledFP8MLP in kinds and fp8.TiledFP8SharedExpertMLP in kinds
    grouped = EXPERTS | settings | {"moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256}
    model = build(**grouped | {"moe_grouped_gemm": True}, **bf16_ends)
    expected = [TiledTEGroupedMLP, TiledFP8GroupedMLP, TiledFP8GroupedMLP, TiledTEGroupedMLP]
    reports = tile(model, TilingConfig(factor=2))
    assert [type(layer.mlp.experts) for layer in model.decoder.layers] == expected
    assert [report.fp8 for report in reports if report.experts] == [False, True, True, False]
    assert "TiledExperts in FP8, at most 2 tiles" in table(reports)
    assert table(tile(model, TilingConfig(factor=2))) == table(reports)
    model = build(**grouped | {"moe_grouped_gemm": True, "fp8_recipe": "mxfp8"})
    assert "--fp8-recipe mxfp8: FP8 tiles know" in table(tile(model, TilingConfig(factor=2)))
    assert all(type(layer.mlp.experts) is TEGroupedMLP for layer in model.decoder.layers)
    hooked = mlps[1]
    assert hooked.reason_for_stock_forward() == "FP8 is off"
    print("FP8: as in bf16", flush=True)


def norm_kernels_on_cpu() -> None:
    """TransformerEngine's norms run with torch in the place of their kernels."""
    from transformer_engine.pytorch.ops.basic import layer_norm, rmsnorm

    def gradients(of: Any, grad_output: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            return torch.autograd.grad(of(*leaves), leaves, grad_output)

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    rest = torch.zeros(1)
    rmsnorm.rmsnorm_fwd = lambda x, weight, *options: (rms(x, weight), None, rest)
    rmsnorm.rmsnorm_bwd = lambda dy, x, rstd, weight, *options: gradients(rms, dy, x, weight)
    layer_norm.layernorm_fwd = lambda x, weight, bias, *options: (layer(x, weight, bias), rest, rest)
    layer_norm.layernorm_bwd = lambda dy, x, mean, rstd, weight, *options: gradients(
        layer, dy, x, weight, torch.zeros_like(weight)
    )
    for module in (rmsnorm, layer_norm):
        module.clear_tensor_data = lambda *tensors: None  # asks for a tensor on a GPU


def check_norms() -> None:
    """A tiled layer's norm does what TransformerEngine's does, and is fused once with gradients and once without."""
    from transformer_engine.pytorch.ops import fuser

    from megatron_tiling import TilingConfig, tile
    from tests.support.te_models import LLAMA

    norm_kernels_on_cpu()
    made: list[Any] = []
    init = fuser.OperationFuser.__init__

    def counted(self: Any, ops: Any) -> None:
        made.append(self)
        init(self, ops)

    fuser.OperationFuser.__init__ = counted
    for changes in (LLAMA, {}):
        model = build(**changes)
        tile(model, TilingConfig(factor=2))
        layer = model.decoder.layers[0].mlp.linear_fc1
        parameters = ("layer_norm_weight", "layer_norm_bias")[: 1 if changes else 2]
        for _ in range(2):  # with a model's own parameters, and with others in their place
            for name in parameters:
                setattr(layer, name, torch.nn.Parameter(torch.randn(32)))
            made.clear()
            for _ in range(3):
                x, grad_output = torch.randn(5, 2, 32, requires_grad=True), torch.randn(5, 2, 32)
                wrt = [x, *(getattr(layer, name) for name in parameters)]
                output = layer.normalized(x)
                with torch.no_grad():
                    assert torch.equal(layer.normalized(x), output)
                ours = torch.autograd.grad(output, wrt, grad_output)
                fused = len(made)
                expected = layer._norm.norm(x)
                assert len(made) == fused + 1 and made.pop()  # as TransformerEngine's own is at every call
                assert torch.equal(output, expected)
                assert all(map(torch.equal, ours, torch.autograd.grad(expected, wrt, grad_output)))
            assert len(made) == 2, made
        kind, fused = type(layer._norm.norm), len(made)
        forward = kind.forward
        kind.forward = lambda norm, x: x + norm.eps
        assert torch.equal(layer.normalized(x), x + layer.eps)
        kind.forward = forward
        assert torch.equal(layer.normalized(x), expected) and len(made) == fused
    fuser.OperationFuser.__init__ = init
    print("norms: as TransformerEngine's own", flush=True)


def main() -> None:
    prepare(Path(sys.argv[1]))
    import transformer_engine.pytorch
    from megatron.core import parallel_state

    assert "stand_ins" not in transformer_engine.pytorch.__file__
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    check_models()
    check_checkpoints()
    check_reasons()
    check_fp8()
    check_norms()
    torch.distributed.destroy_process_group()
    print(f"TransformerEngine {transformer_engine.__version__}: checks passed", flush=True)


if __name__ == "__main__":
    main()

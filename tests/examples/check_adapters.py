"""Frozen weights cost nothing, and LoRA on tiled layers has the gradients that it has on dense ones.

torchrun --standalone --nproc-per-node 2 -m tests.examples.check_adapters
"""

from typing import Any

import torch
import torch.distributed as dist
from lora import LoRALinear, add_lora, merge_lora
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks

from megatron_tiling import TilingConfig, tile
from megatron_tiling.resident.mlp import TiledMLP
from tests.resident import check_mlp
from tests.support.harness import Counter, megatron, naming, relative_error

TILES, SEQUENCE, BATCH, VOCABULARY = 3, 8, 2, 64
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def make_config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        ffn_hidden_size=40,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
    )


def measured(module: Any, input_: torch.Tensor) -> tuple[int, bool]:
    """GEMMs of the backward pass, and whether the input was saved for it."""
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(input_)[0]
    with Counter() as backward:
        output.sum().backward()
    return backward.gemms, input_.untyped_storage().data_ptr() in saved


def check_frozen_layers() -> None:
    options: dict[str, Any] = {
        "config": make_config(),
        "init_method": torch.nn.init.xavier_normal_,
        "bias": False,
        "skip_bias_add": False,
    }
    column = ColumnParallelLinear(24, 48, gather_output=False, **options)
    row = RowParallelLinear(48, 24, input_is_parallel=True, **options)
    tile(torch.nn.ModuleDict({"linear_fc1": column, "linear_fc2": row}), TilingConfig(factor=TILES))
    for layer in (column, row):
        input_ = torch.randn(SEQUENCE, BATCH, layer.weight.shape[1], requires_grad=True)
        assert measured(layer, input_) == (2 * TILES, True)
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
        assert measured(layer, input_) == (TILES, False), type(layer)
        assert layer.weight.grad is None


def check_frozen_mlp() -> None:
    """All tiles keep their pre-activations: dgrad and wgrad of fc1 are one GEMM each, those of fc2 one a tile."""
    gemms = {
        "": 2 * TILES + 2,
        "linear_fc1": 2 * TILES + 1,
        "linear_fc2": TILES + 2,
        "linear_fc1 linear_fc2": TILES + 1,
    }
    for frozen, expected in gemms.items():
        case = {"expert": False, "bias": False, "sequence_parallel": False, "gated": True, "frozen": frozen}
        case |= {"tiles": TILES, "keep": None, "fusion": False, "storage": "resident"}
        mlp = check_mlp.tiled_copy(check_mlp.stock_mlp(case), case)
        hidden = torch.randn(SEQUENCE, BATCH, mlp.linear_fc1.weight.shape[1], dtype=torch.float64, requires_grad=True)
        assert measured(mlp, hidden) == (expected, "fc1" not in frozen), frozen


def model() -> GPTModel:
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(11)
    return GPTModel(make_config(), get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=SEQUENCE,
                    share_embeddings_and_output_weights=False)  # fmt: skip


def loss_of(gpt: Any) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    losses: torch.Tensor = gpt(tokens, torch.arange(SEQUENCE).expand(BATCH, -1), mask, labels=tokens.roll(-1, 1))
    return losses.mean()


def check_frozen_head() -> None:
    """Its input it keeps all the same: the backward pass makes the logits again, and their gradient from them."""
    counts = []
    for frozen in (False, True):
        gpt = model()
        tile(gpt, TilingConfig(modules=("output",), splits={"output": (1, TILES)}))
        gpt.output_layer.weight.requires_grad_(not frozen)
        loss = loss_of(gpt)
        with Counter() as backward:
            loss.backward()
        counts.append(backward.gemms)
        assert (gpt.output_layer.weight.grad is None) == frozen
    assert counts[0] - counts[1] == TILES, counts


def with_lora(gpt: GPTModel) -> GPTModel:
    add_lora(gpt, TARGETS, rank=4, alpha=8)
    for module in gpt.modules():
        if isinstance(module, LoRALinear):  # zeros would hide the gradient of the other factor
            torch.nn.init.normal_(module.b.weight, std=0.1)
    return gpt


def check_lora() -> None:
    """Adapters as on dense layers, before and after they are merged; the frozen weights have no gradients."""
    dense, tiled = model(), model()
    tile(tiled, TilingConfig(factor=TILES, modules="all"))
    dense, tiled = with_lora(dense), with_lora(tiled)
    adapters = [module for module in tiled.modules() if isinstance(module, LoRALinear)]
    mlps = [module for module in tiled.modules() if isinstance(module, TiledMLP)]
    assert len(adapters) == 2 * len(TARGETS)
    for mlp in mlps:
        assert mlp.reason_for_stock_forward() == "linear_fc1 is not a tiled layer any more"
    with torch.no_grad():
        for weight, dense_weight in zip(tiled.parameters(), dense.parameters(), strict=True):
            weight.copy_(dense_weight)
    found, expected = loss_of(tiled), loss_of(dense)
    found.backward()
    expected.backward()
    assert relative_error(found, expected) < 1e-6
    dense_weights = dict(dense.named_parameters())
    for name, weight in tiled.named_parameters():
        is_adapter = name.endswith((".a.weight", ".b.weight"))
        assert weight.requires_grad == is_adapter, name
        assert (weight.grad is not None) == is_adapter, name
        if is_adapter:
            assert weight.grad.abs().sum() > 0, name
            error = relative_error(weight.grad, dense_weights[name].grad)
            assert error < 5e-6, f"{name}: relative error {error:.1e}"
    merge_lora(tiled)
    assert not any(isinstance(module, LoRALinear) for module in tiled.modules())
    assert [mlp.reason_for_stock_forward() for mlp in mlps] == ["", ""]
    assert relative_error(loss_of(tiled), expected) < 1e-6


def main() -> None:
    checks = [check_frozen_layers, check_frozen_mlp, check_frozen_head, check_lora]
    with megatron():
        for tp in (1, dist.get_world_size()):
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
            model_parallel_cuda_manual_seed(11)
            check_mlp.TP = tp
            for check in checks:
                with naming(f"{check.__name__} at TP={tp}"):
                    check()
            if dist.get_rank() == 0:
                print(f"{len(checks)} checks passed at TP={tp}", flush=True)


if __name__ == "__main__":
    main()

"""Megatron-Bridge's models, loads, exports and adapters, dense and tiled, at TP=2 and TP=1.

PYTHONPATH=tests/stand_ins torchrun --standalone --nproc-per-node 2 -m tests.integrations.check_bridge FOLDER

TransformerEngine is the project's stand-in; nothing else is.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_tiling import TilingConfig, tile
from megatron_tiling.config import MODULES
from megatron_tiling.integrations.bridge import tile_provider
from megatron_tiling.resident.mlp import TiledMLP
from tests.check_models import expect_error
from tests.integrations import small_models
from tests.support.harness import Counter, load_deepspeed, megatron, peak_bytes, relative_error

CONFIG = TilingConfig(3, MODULES)
#: Model, tied embeddings, specs of TransformerEngine, and settings of the provider.
MODELS: list[tuple[str, bool, bool, dict[str, Any]]] = [
    ("llama", False, True, {}),
    ("llama", False, False, {}),
    ("qwen2", True, True, {}),
    ("qwen3", False, True, {}),
    ("qwen3_moe", False, True, {"moe_grouped_gemm": True}),
    ("qwen3_moe", False, True, {"moe_grouped_gemm": False}),
]
#: Adapters, and the models that they are put on.
ADAPTED = {"lora": [MODELS[index] for index in (0, 1, 2, 5)], "dora": MODELS[:2], "canonical": MODELS[:2]}
OFF = ("gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
OFF += ("apply_rope_fusion", "cross_entropy_loss_fusion", "persist_layer_norm", "bf16", "fp16", "moe_permute_fusion")


class Case:
    """One small model: what Bridge makes of it."""

    def __init__(self, folder: Path, kind: str, tied: bool, te: bool, settings: dict[str, Any]) -> None:
        from megatron.bridge import AutoBridge

        path = folder / f"{kind}{'-tied' if tied else ''}"
        if dist.get_rank() == 0 and not path.exists():
            small_models.save(folder, kind, tied)
        dist.barrier()
        self.bridge = AutoBridge.from_hf_pretrained(str(path), dtype=torch.float32)
        self.te, self.settings = te, settings

    def provider(self, load: bool = True) -> Any:
        from megatron.bridge.models.gpt_provider import local_layer_spec

        provider = self.bridge.to_megatron_provider(load_weights=load)
        world = parallel_state.get_tensor_model_parallel_world_size()
        provider.tensor_model_parallel_size, provider.sequence_parallel = world, world > 1 and self.te
        provider.seq_length = small_models.SEQUENCE
        provider.params_dtype = provider.pipeline_dtype = torch.float32
        for name in OFF:
            setattr(provider, name, False)
        for name, value in self.settings.items():
            setattr(provider, name, value)
        if not self.te:
            provider.transformer_layer_spec = local_layer_spec
        provider.finalize()
        return provider

    def build(self, *hooks: Callable[[Any], Any], load: bool = True) -> Any:
        """A model through ``hooks``, each of which may be ``tile_provider`` or a function of the chunks."""
        provider = self.provider(load)
        for hook in hooks:
            if hook is tile_provider:
                tile_provider(provider, CONFIG)
            else:
                provider.register_pre_wrap_hook(hook)
        return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)

    def exported(self, model: Any) -> dict[str, torch.Tensor]:
        return {
            name: tensor.clone() for name, tensor in self.bridge.export_hf_weights(model, cpu=True, show_progress=False)
        }


def loss_of(model: Any) -> torch.Tensor:
    losses: torch.Tensor = model[0](**small_models.batch())
    return losses.mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model[0].named_parameters() if one.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    scale = max(float(one.detach().norm()) for one in expected.values())
    for name, one in found.items():
        assert one.shape == expected[name].shape, name
        error = float((one.detach() - expected[name].detach()).norm())
        near_zero = float(expected[name].detach().norm()) < 1e-6 * scale
        assert near_zero or relative_error(one.detach(), expected[name].detach()) <= limit, (name, error)


def check_models(folder: Path) -> None:
    """Loaded before and after tiling: the loss, gradients, and export to the last bit."""
    for kind, tied, te, settings in MODELS:
        case = Case(folder, kind, tied, te, settings)
        dense = case.build()
        expected = loss_of(dense)
        expected.backward()
        exported = case.exported(dense)
        late = case.build(tile_provider, load=False)
        case.bridge.load_hf_weights(late)
        for tiled in (case.build(tile_provider), late):
            names = {type(module).__name__ for module in tiled[0].modules()}
            assert "TiledTELayerNormColumnParallelLinear" in names if te else "TiledColumnParallelLinear" in names
            found = loss_of(tiled)
            assert abs(float(found) - float(expected)) <= 1e-6 * abs(float(expected)), (kind, float(found))
            tiled[0].zero_grad()
            loss_of(tiled).backward()
            assert_close(gradients(tiled), gradients(dense), 5e-6)
            copies = case.exported(tiled)
            assert copies.keys() == exported.keys()
            assert all(torch.equal(copies[name], one) for name, one in exported.items()), kind


def adapter_of(kind: str) -> Any:
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    return {"lora": LoRA, "dora": DoRA, "canonical": CanonicalLoRA}[kind](dim=4, alpha=8)


def trained(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model[0].named_parameters() if one.requires_grad}


def check_adapters(folder: Path) -> None:
    """LoRA, DoRA and CanonicalLoRA before and after tiling; LoRA's merged export."""
    for kind, models in ADAPTED.items():
        for model, tied, te, settings in models:
            case = Case(folder, model, tied, te, settings)

            def adapt(chunks: Any, kind: str = kind) -> Any:
                return adapter_of(kind)(chunks, training=True)

            dense = case.build(adapt)
            for index, (_, one) in enumerate(sorted(trained(dense).items())):
                seed = 100 + index + 1000 * dist.get_rank()
                torch.nn.init.normal_(one.data, std=0.3, generator=torch.Generator().manual_seed(seed))
            expected = loss_of(dense)
            expected.backward()
            for hooks in ((tile_provider, adapt), (adapt, tile_provider)):
                tiled = case.build(*hooks)
                assert any(isinstance(module, TiledMLP) for module in tiled[0].modules()) or hooks[0] is adapt
                wanted = trained(dense)
                assert trained(tiled).keys() == wanted.keys()
                with torch.no_grad():
                    for name, one in trained(tiled).items():
                        one.copy_(wanted[name])
                found = loss_of(tiled)
                found.backward()
                assert abs(float(found) - float(expected)) <= 1e-6 * abs(float(expected)), (kind, model, float(found))
                assert_close(gradients(tiled), gradients(dense), 1e-5)
                if kind == "lora":
                    merged, copies = case.exported(dense), case.exported(tiled)
                    assert merged.keys() == copies.keys()
                    assert all(torch.equal(copies[name], one) for name, one in merged.items())


def check_lora_in_the_loop(folder: Path) -> None:
    """In float64: kept tiles, frozen and trained weights, one layer adapted or both, and what leaves the loop."""
    from megatron.bridge.peft.lora import LoRA

    size = parallel_state.get_tensor_model_parallel_world_size()
    for te, sequence_parallel in ((True, False), (True, size > 1), (False, False)):
        case = Case(folder, "llama", False, te, {"sequence_parallel": sequence_parallel})
        for targets in (["linear_fc1", "linear_fc2"], ["linear_fc1"], ["linear_fc2"]):
            dense = case.build(lambda chunks, t=targets: LoRA(target_modules=t, dim=4, alpha=8)(chunks, training=True))
            stock = dense[0].double().decoder.layers[0].mlp
            for index, (_, one) in enumerate(sorted(trained(dense).items())):
                seed = 100 + index + 1000 * dist.get_rank()
                torch.nn.init.normal_(one.data, std=0.3, generator=torch.Generator().manual_seed(seed))
            for frozen in (True, False):
                for name, one in stock.named_parameters():
                    one.requires_grad_("adapter" in name or not frozen)
                expected = mlp_step(stock)
                for keep in (None, 0, 1):
                    tiled = copy.deepcopy(stock, groups_of(stock))
                    tile(tiled, TilingConfig(3, ("fc1", "fc2"), mlp_keep=keep))
                    assert isinstance(tiled, TiledMLP) and tiled.reason_for_stock_forward() == ""
                    with Counter() as counter:
                        found = mlp_step(tiled)
                    assert counter.gemms > 0
                    assert found.keys() == expected.keys()
                    for name, one in expected.items():
                        assert relative_error(found[name], one) < 1e-12, (name, te, targets, keep, frozen)


def check_memory_of_lora(folder: Path) -> None:
    """Bytes at the peak of a step of an MLP with frozen weights: no whole intermediate, nor one for the adapters."""
    from megatron.bridge.peft.lora import LoRA

    sizes = {"hidden_size": 256, "ffn_hidden_size": 1024, "kv_channels": 64, "sequence_parallel": False}
    case = Case(folder, "llama", False, True, sizes)
    dense = case.build(lambda chunks: LoRA(dim=8, alpha=8)(chunks, training=True), load=False)[0].decoder.layers[0].mlp
    hidden = torch.randn(2048, 1, 256, requires_grad=True)

    def peak(mlp: Any) -> int:
        def step() -> None:
            output = mlp(hidden)[0]
            output.backward(torch.ones_like(output))
            hidden.grad = None
            mlp.zero_grad()

        step()
        return peak_bytes(step)

    whole = peak(dense)
    for keep, share in (("all", 0.6), (0, 0.45)):
        tiled = copy.deepcopy(dense, groups_of(dense))
        tile(tiled, TilingConfig(8, ("fc1", "fc2"), mlp_keep=keep))  # type: ignore[arg-type]
        found = peak(tiled) / whole
        assert found < share, (keep, found)
        if dist.get_rank() == 0:
            print(f"an MLP with LoRA of rank 8, keep {keep}: {found:.2f} of stock's bytes", flush=True)


def check_what_leaves_the_loop(folder: Path) -> None:
    """Adapters that compute otherwise run by themselves, on the tiled layers."""
    from megatron.bridge.peft.lora import LoRA

    changes: dict[str, Callable[[Any], Any]] = {
        "switched off": lambda wrapper: wrapper.disable_adapter_layers(),
        "dropout": lambda wrapper: setattr(wrapper.adapter, "dropout", torch.nn.Dropout(0.1).eval()),
        "a2a_experimental": lambda wrapper: setattr(wrapper.adapter, "use_a2a", True),
        "has hooks": lambda wrapper: wrapper.adapter.register_forward_hook(lambda *arguments: None),
        "is no LoRA": lambda wrapper: setattr(wrapper, "forward", wrapper.forward),
    }
    case = Case(folder, "llama", False, True, {"sequence_parallel": False})  # gloo has no all-to-all
    for words, change in changes.items():
        for name in ("linear_fc1", "linear_fc2"):
            mlp = (
                case.build(lambda chunks: LoRA(dim=4, alpha=8)(chunks, training=True))[0].double().decoder.layers[0].mlp
            )
            change(getattr(mlp, name))
            dense = mlp_step(mlp)
            reports = tile(mlp, TilingConfig(3, ("fc1", "fc2")))
            assert words in mlp.reason_for_stock_forward(), words
            assert any(words in report.reason for report in reports), words
            for key, one in mlp_step(mlp).items():
                assert relative_error(one, dense[key]) < 1e-12, (words, key)


def groups_of(module: torch.nn.Module) -> dict[int, Any]:
    """What a deep copy shares: process groups."""
    held = (value for one in module.modules() for value in vars(one).values())
    groups = [value for value in held if isinstance(value, dist.ProcessGroup)]
    for one in module.modules():
        collection = getattr(one, "pg_collection", None)
        groups += [] if collection is None else [collection]
    return {id(group): group for group in groups}


def mlp_step(mlp: Any) -> dict[str, torch.Tensor]:
    """Output and gradients; the input is a rank's own under sequence parallelism."""
    mlp.zero_grad()
    sequence_parallel = mlp.config.sequence_parallel
    generator = torch.Generator().manual_seed(7 + dist.get_rank() * sequence_parallel)
    hidden = torch.randn(4, 2, 32, dtype=torch.float64, generator=generator).requires_grad_()
    output = mlp(hidden)[0]
    (output * torch.randn(output.shape, dtype=torch.float64, generator=generator)).sum().backward()
    grads = {name: one.grad.clone() for name, one in mlp.named_parameters() if one.grad is not None}
    return grads | {"output": output.detach(), "hidden": hidden.grad}


def check_providers(folder: Path) -> None:
    """A second call changes nothing, another config and partitioned storage are refused."""
    case = Case(folder, "llama", False, True, {})
    provider = case.provider()
    assert tile_provider(tile_provider(provider, CONFIG), CONFIG) is provider
    assert len(provider._pre_wrap_hooks) == 2
    expect_error(lambda: tile_provider(provider, TilingConfig(factor=2)), "is tiled by")
    partitioned = TilingConfig(factor=2, storage="partitioned")
    expect_error(lambda: tile_provider(case.provider(), partitioned), "--tiled-linear-storage partitioned")
    provider = case.provider()
    provider.cross_entropy_loss_fusion, provider.cross_entropy_fusion_impl = True, "te"
    tile_provider(provider, CONFIG, native_loss=True)
    assert provider.cross_entropy_fusion_impl == "native"


def main() -> None:
    from megatron.bridge.peft import utils

    utils.version = lambda name: "2.6.0"  # the stand-in has no package metadata
    folder = Path(sys.argv[1])
    load_deepspeed()
    with megatron(tensor_model_parallel_size=2):
        for size in (2, 1):
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(size)
            model_parallel_cuda_manual_seed(11)
            for name, check in list(globals().items()):
                if name.startswith("check_"):
                    check(folder)
                    if dist.get_rank() == 0:
                        print(f"{name} passed at TP={size}", flush=True)


if __name__ == "__main__":
    main()

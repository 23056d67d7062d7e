"""mcore-bridge's models (ms-swift's), loads, exports and LoRA, dense and tiled by the plugin, at TP=2 and TP=1.

PYTHONPATH=tests/stand_ins torchrun --standalone --nproc-per-node 2 -m tests.integrations.check_mcore_bridge FOLDER

TransformerEngine is the project's stand-in. Of datasets and modelscope, where they are not installed, stubs stand for
the two functions that mcore-bridge imports.
"""

import importlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_tiling.config import VARIABLE
from megatron_tiling.resident.mlp import TiledMLP
from tests.integrations import small_models
from tests.support.harness import load_deepspeed, megatron, relative_error

KINDS = ("llama", "qwen3")
LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def build(folder: Path, kind: str, lora: bool) -> tuple[Any, Any]:
    """A model with its weights, and its bridge; with LoRA around all linear layers if asked."""
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    path = folder / kind
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = ModelConfig(
        **hf_to_mcore_config(AutoConfig.from_pretrained(path)),
        tensor_model_parallel_size=size,
        sequence_parallel=size > 1,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    model_parallel_cuda_manual_seed(11)
    models = get_mcore_model(config)
    config.bridge.load_weights(models, str(path))
    if lora:
        tuned = get_peft_model(models[0], LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, lora_dropout=0.0))
        for index, (_, one) in enumerate(sorted(trained(tuned).items())):
            torch.nn.init.normal_(one.data, std=0.3, generator=torch.Generator().manual_seed(100 + index))
        models = [tuned]
    return models[0], config.bridge


def trained(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def step(model: Any) -> dict[str, torch.Tensor]:
    loss = model(**small_models.batch()).mean()
    loss.backward()
    return {name: one.grad for name, one in trained(model).items()} | {"loss": loss.detach()}


def exported(model: Any, bridge: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bridge.export_weights([model])}


def outcomes(folder: Path) -> list[Any]:
    results: list[Any] = []
    for kind in KINDS:
        for lora in (False, True):
            model, bridge = build(folder, kind, lora)
            results.append((kind, lora, step(model), None if lora else exported(model, bridge), model))
    return results


def stub(package: str, path: str, **members: Any) -> None:
    """A module of a package that is not installed, with what mcore-bridge imports of it."""
    if importlib.util.find_spec(package) is not None:
        return
    for part in ["", *itertools.accumulate(path.split("."), lambda a, b: f"{a}.{b}")]:
        sys.modules[f"{package}.{part}".rstrip(".")] = module = ModuleType(part)
    vars(module).update(members)


def main() -> None:
    stub("datasets", "utils.filelock", FileLock=filelock.FileLock)
    stub("modelscope", "hub.utils.utils", get_cache_dir=lambda: sys.argv[1])
    folder = Path(sys.argv[1])
    load_deepspeed()
    with megatron(tensor_model_parallel_size=2):
        if dist.get_rank() == 0:  # before mcore-bridge changes transformers
            for kind in KINDS:
                small_models.save(folder, kind, tied=False)
        dist.barrier()
        dense = {}
        for tiled in (False, True):
            if tiled:
                os.environ[VARIABLE] = "factor=3 modules=qkv,proj,fc1,fc2,output"
                importlib.import_module("megatron_tiling.integrations.swift")
            for size in (2, 1):
                parallel_state.destroy_model_parallel()
                parallel_state.initialize_model_parallel(size)
                found = outcomes(folder)
                expected = dense.setdefault(size, found)
                for (kind, lora, grads, weights, model), (_, _, wanted, copies, _) in zip(found, expected, strict=True):
                    mlps = [module for module in model.modules() if isinstance(module, TiledMLP)]
                    assert len(mlps) == 2 * tiled
                    assert not any(mlp.reason_for_stock_forward() for mlp in mlps), mlps[0].reason_for_stock_forward()
                    assert grads.keys() == wanted.keys()
                    for name, one in wanted.items():
                        assert relative_error(grads[name], one) <= (1e-6 if name == "loss" else 1e-5), (
                            kind,
                            lora,
                            name,
                        )
                    assert lora or all(torch.equal(weights[name], one) for name, one in copies.items())
                if tiled and dist.get_rank() == 0:
                    print(f"mcore-bridge passed at TP={size}", flush=True)


if __name__ == "__main__":
    main()

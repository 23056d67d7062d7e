"""What the ZeRO-3 benchmarks share: process groups on GPUs or, for a dry run, on CPUs; configurations; models."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.zero3 import engine as zero3

#: DeepSpeed's own thresholds, which suit dense layers.
DEFAULTS = {
    "stage3_max_live_parameters": int(1e9),
    "stage3_max_reuse_distance": int(1e9),
    "stage3_prefetch_bucket_size": int(5e7),
    "stage3_param_persistence_threshold": int(1e5),
    "reduce_bucket_size": int(5e8),
}


@contextlib.contextmanager
def megatron(tensor_parallel: int) -> Iterator[None]:
    """Megatron's process groups, in a world of torchrun's processes or of this one alone."""
    if not torch.cuda.is_available():
        from megatron_tiling import cpu

        cpu.install(train=False)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "MASTER_PORT" in os.environ:
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    model_parallel_cuda_manual_seed(11)
    try:
        yield
    finally:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def transformer(**options: Any) -> Any:
    """A bf16 ``TransformerConfig`` of plain torch kernels."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        "num_attention_heads": 8,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**(defaults | options))


def quiet_engine(zero: dict[str, Any], **options: Any) -> dict[str, Any]:
    """DeepSpeed's configuration of a bf16 run with these ``zero_optimization`` settings."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000000,
    } | options


class MLPStack(torch.nn.Module):
    """Megatron MLPs one after another, and nothing else: ``[s, b, h]`` -> a scalar loss."""

    def __init__(self, config: Any, depth: int, factor: int | None) -> None:
        from benchmarks.zero3_collectives import dense
        from megatron_tiling import TilingConfig, tile

        super().__init__()
        self.config = config
        self.mlps = torch.nn.ModuleList(dense(config) for _ in range(depth))
        if factor is not None:
            tile(self, TilingConfig(factor=factor, storage="partitioned"))

    def forward(self, hidden: Tensor) -> Tensor:
        for mlp in self.mlps:
            hidden = hidden + mlp(hidden)[0]
        return hidden.float().square().mean()


def gpt(config: Any, words: int, sequence: int, tiling: dict[str, Any] | None) -> torch.nn.Module:
    """A GPTModel of Megatron's local layers, with partitioned tiles as these fields of ``TilingConfig`` say."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_tiling import TilingConfig, tile

    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    model = GPTModel(
        config, spec, words, sequence, share_embeddings_and_output_weights=False, position_embedding_type="rope"
    )
    if tiling is not None:
        tile(model, TilingConfig(storage="partitioned", **tiling))
    return model


def engine_of(config: Any, build: Any, zero: dict[str, Any], optimizer: Any, **options: Any) -> Any:
    """The engine of ``build()``, its parameters partitioned as they are made.

    Args:
        options: of ``zero3.initialize``.
    """
    settings = quiet_engine(zero)
    model = zero3.build(build, config, settings)
    return zero3.initialize(model, optimizer, settings, **options)


def forget(engine: Any) -> None:
    """Free an engine's memory; DeepSpeed's list of running modules keeps every model's root, for one."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    engine.destroy()
    FWD_MODULE_STACK.clear()
    gc.collect()

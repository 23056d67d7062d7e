"""Experts as the planner sees them, with rows that are stated, beside real ones, with rows that a router's values say.

    python -m tests.plan.check_experts
    torchrun --standalone --nproc-per-node 2 -m tests.plan.check_experts

A line of JSON for each model, of two ranks. Modules are the planner's TransformerEngine's, in the form of a CPU: they
compute nothing, and take real tensors as well. The router is made to send each expert as many rows.
"""

import functools
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from megatron_tiling import cpu
from megatron_tiling.config import TilingConfig
from megatron_tiling.plan import gpu, routing, transformer_engine
from megatron_tiling.plan.process_groups import fake_process_groups
from megatron_tiling.plan.transformer_engine import kernels
from tests.plan.check_fake import SEQUENCE, seen
from tests.support.harness import leave

EP = {"expert_model_parallel_size": 2}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SPLIT = TP | {"expert_tensor_parallel_size": 2}
GATHERS = {"moe_token_dispatcher_type": "allgather"}
#: Changes of Megatron's config, and of the tiling, if any.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "EP=2": (EP, None),
    "EP=2, gathered": (EP | GATHERS, None),
    "EP=2, fused": (EP | {"moe_permute_fusion": True, "moe_router_dtype": "fp32"}, None),
    "TP=2, EP=2, shared experts": (
        TP | EP | {"expert_tensor_parallel_size": 1, "moe_shared_expert_intermediate_size": 64}, None,
    ),
    "expert TP=2": (SPLIT, None),
    "expert TP=2, gathered": (SPLIT | GATHERS, None),
    "EP=2, one expert after the other": (EP | {"moe_grouped_gemm": False}, None),
    "EP=2, to capacity": (EP | {"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True}, None),
    "EP=2, recompute": (EP | {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}, None),
    "EP=2, tiled": (EP, {"modules": ("experts",), "mlp_keep": 1}),
    "EP=2, gathered, tiled": (EP | GATHERS, {"modules": ("experts",), "mlp_keep": 0}),
    "alone": ({}, None),
    "alone, gathered": (GATHERS, None),
    "alone, tiled": ({}, {"modules": ("experts",), "mlp_keep": 0}),
}  # fmt: skip
VOCABULARY = 64  # or logits would make all peaks
SIZES = "tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


def build(changes: dict[str, Any], tiling: dict[str, Any] | None) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_tiling import tile

    options: dict[str, Any] = {"moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall"} | changes
    config = TransformerConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
        hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm", num_moe_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=128, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, **options,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec(8, moe_grouped_gemm=options["moe_grouped_gemm"])
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")
    if tiling is not None:
        tile(model, TilingConfig(**tiling))
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def balance() -> None:
    """Routers send token t to experts 2t and 2t + 1, of 8."""
    from megatron.core.transformer.moe.router import TopKRouter

    router: Any = TopKRouter
    stock = router.gating

    def gating(self: Any, input: Tensor) -> Tensor:
        logits = stock(self, input)
        tokens = logits.shape[0] * logits.shape[1]
        chosen = torch.eye(4).repeat_interleave(2, dim=1).repeat(tokens // 4, 1).view(logits.shape)
        balanced: Tensor = (logits * 0).nan_to_num() + 8 * chosen.to(logits.dtype)
        return balanced

    router.gating = gating


def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """As Megatron's, which leaves what is on a CPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def main() -> None:
    alone = "RANK" not in os.environ
    torch.set_num_threads(1)
    transformer_engine.install()
    cpu.install(train=False)
    if alone:
        fake_process_groups(world=2, rank=0)
    else:
        torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    gpu.forget_random_states()
    balance()
    if alone:
        routing.install(1.0)
    else:
        from megatron.core.transformer.moe import token_dispatcher

        token_dispatcher.maybe_move_tensor_to_cpu = move_to_host
    for name, (changes, tiling) in MODELS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        sizes = {size: changes[size] for size in SIZES if size in changes}
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(11)
        parallel_state.get_global_memory_buffer().buffer.clear()
        kernels._held.clear()  # which real models share
        found = seen(functools.partial(build, changes, tiling), alone)
        if torch.distributed.get_rank() == 0:
            print("SEEN", json.dumps([name, "fake" if alone else "real", found]), flush=True)
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main()

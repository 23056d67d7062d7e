"""Models of TransformerEngine's layer specs, dense ones, and what checks ask of them."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

from tests.check_models import batch, gpt, make_config

LLAMA = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "num_query_groups": 2,
    "layernorm_zero_centered_gamma": True,
}
EXPERTS = LLAMA | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "allgather",
    "moe_shared_expert_intermediate_size": 16,
}


def tp() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def te_gpt(grouped: bool = False, rewrite: Any = None, **changes: Any) -> Any:
    """A dense model; every parameter, the norms' too, has other values than others of its kind."""
    config = make_config(tensor_model_parallel_size=tp(), **changes)
    spec = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, moe_grouped_gemm=grouped)
    model = gpt(config, spec=rewrite(spec) if rewrite else spec)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            noise = torch.randn(parameter.numel() * 2, generator=generator)  # a shard draws as much as a whole
            parameter.data += 0.1 * noise[: parameter.numel()].view_as(parameter)
    return model


def inputs() -> dict[str, torch.Tensor]:
    return batch() | {"attention_mask": None}


def entries(model: Any) -> dict[str, Any]:
    """What a sharded checkpoint would hold of a model, without the values."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    attributes = ("key", "global_shape", "global_offset", "local_shape", "replica_id", "axis_fragmentations")
    return {
        key: [type(entry), *(str(getattr(entry, attribute, None)) for attribute in attributes)]
        for key, entry in model.sharded_state_dict(metadata=metadata).items()
    }


def settings() -> Iterator[dict[str, Any]]:
    """Models, with and without sequence parallelism; Megatron trains experts with tensor parallelism only with it."""
    for changes, sequence_parallel in itertools.product(({}, LLAMA, EXPERTS), (False, True)):
        if sequence_parallel == (tp() > 1) or (tp() > 1 and changes is not EXPERTS):
            yield changes | {"sequence_parallel": sequence_parallel}

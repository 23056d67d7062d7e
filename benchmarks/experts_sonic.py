"""SonicMoE's experts (arXiv:2512.14080, package sonic-moe), on a copy of the weights of Megatron's grouped experts."""

import importlib.util
from collections.abc import Callable
from typing import Any

NAME = "SonicMoE"


def to_be_had() -> bool:
    return importlib.util.find_spec("sonicmoe") is not None


def leave_untuned() -> None:
    """Every product with quack's default configuration, from now on: its tuner takes minutes for each."""
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig, Autotuner

    for product in vars(gemm_interface).values():
        if isinstance(product, Autotuner):
            product.configs = [AutotuneConfig(config=None)]


def run_of(experts: Any, routing_map: Any, probs: Any) -> Callable[[Any], Any]:
    """``run(hidden [tokens, h]) -> [tokens, h]``, tokens combined.

    ``routing_map`` is ``[tokens, experts]``; ``probs`` are those of its pairs, ordered by expert. Its gradients of
    weights are bf16 tensors, which a hook adds to a float32 ``main_grad`` as Megatron does where nothing is fused.
    """
    import torch
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    count = routing_map.shape[1]
    weights = []
    for layer in (experts.linear_fc1, experts.linear_fc2):
        stacked = torch.stack([getattr(layer, f"weight{number}").detach() for number in range(count)])
        weight = torch.nn.Parameter(stacked.permute(1, 2, 0))  # [out, in, experts]; experts outermost in memory
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.register_post_accumulate_grad_hook(add_to_main_grad)
        weights.append(weight)
    places = torch.empty_like(routing_map, dtype=torch.long)
    places.t()[routing_map.t()] = torch.arange(len(probs), device=probs.device)
    by_token = places[routing_map]
    token_indices, expert_indices = (indices.int() for indices in routing_map.nonzero(as_tuple=True))
    stream = torch.cuda.current_stream().cuda_stream

    def run(hidden: Any) -> Any:
        return moe_general_routing_inputs(
            hidden, probs[by_token], token_indices, expert_indices, weights[0], None, weights[1], None, count, stream,
            ActivationType.SWIGLU, concat_layout=True,
        )[0]  # fmt: skip

    return run


def add_to_main_grad(weight: Any) -> None:
    weight.main_grad.add_(weight.grad)
    weight.grad = None

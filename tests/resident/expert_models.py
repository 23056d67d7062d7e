"""Whole models with grouped experts, stock and tiled, and what surrounds experts there: for ``check_experts.py``."""

from functools import partial
from typing import Any
from unittest.mock import Mock, patch

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import experts as stock
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tiling import TilingConfig, tile
from megatron_tiling.report import table
from megatron_tiling.resident import dispatch
from megatron_tiling.resident import experts as grouped
from megatron_tiling.trainer.hook import reasons_for_no_tiles
from tests.check_models import assert_same, gpt, make_config, step
from tests.support.te_models import EXPERTS, entries, inputs


def models(**changes: Any) -> tuple[Any, Any]:
    """Dense and tiled."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    found = []
    for _ in range(2):
        tp = parallel_state.get_tensor_model_parallel_world_size()
        sizes = {"expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size()}
        sizes |= {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1}
        config = make_config(**sizes | EXPERTS | {"moe_grouped_gemm": True, "num_query_groups": 4} | changes)
        found.append(gpt(config, spec=get_gpt_layer_with_transformer_engine_spec(4, moe_grouped_gemm=True)))
    return found[0], found[1]


def check_models() -> None:
    """The same parameters, gradients and checkpoints in a whole model, with what surrounds experts."""
    dispatchers = ("allgather", "alltoall")
    surroundings: list[dict[str, Any]] = [{"moe_token_dispatcher_type": dispatcher} for dispatcher in dispatchers]
    recompute = {"recompute_granularity": "selective"}
    surroundings += [recompute | {"recompute_modules": modules} for modules in (["moe_act"], ["moe"])]
    capacity = {"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"}
    surroundings += [capacity, capacity | {"moe_pad_expert_input_to_capacity": True}]
    if parallel_state.get_tensor_model_parallel_world_size() > 1:  # gloo gathers no uneven numbers of rows
        surroundings = [changes for changes in surroundings if "alltoall" not in changes.values()]
    for changes in surroundings:
        dense, tiled = models(**changes)
        parameters = dict(tiled.named_parameters())
        tile(tiled, TilingConfig(factor=3, modules=("fc1", "fc2", "experts"), mlp_keep=1))
        experts = [module for module in tiled.modules() if isinstance(module, grouped.TiledExperts)]
        assert len(experts) == 2 and all(isinstance(one, stock.TEGroupedMLP) for one in experts)
        assert all(parameter is parameters[name] for name, parameter in tiled.named_parameters())
        assert entries(tiled) == entries(dense) and list(tiled.state_dict()) == list(dense.state_dict())
        alone = torch.distributed.get_world_size(experts[0].tp_group) * experts[0].ep_group.size() == 1
        gathers = alone and not changes.get("moe_pad_expert_input_to_capacity")
        assert all((one._dispatcher is not None) == gathers for one in experts)
        assert table(tiled.tiling_reports).count("tokens kept once") == gathers
        loops = [Mock(wraps=one._run_loop) for one in experts]
        for one, loop in zip(experts, loops, strict=True):
            one._run_loop = loop
        assert_same(step(tiled, **inputs()), step(dense, **inputs()))
        assert all(loop.called and (loop.call_args.args[-1] is not None) == gathers for loop in loops)


def check_nothing_but_experts() -> None:
    """Is enough for a run: their tiles are no tiled linear layers."""
    _, tiled = models()
    tile(tiled, TilingConfig(modules=("experts",)))
    assert reasons_for_no_tiles([tiled]) is None


def check_other_rows() -> None:
    """Rows that are no copies of tokens in their order, from the first dispatch on or later, are found out and kept."""

    def doubled_before_dispatch(mlp: Any) -> None:
        own = mlp.token_dispatcher.token_dispatch
        mlp.token_dispatcher.token_dispatch = lambda hidden, probs: own(hidden * 2, probs)

    def doubled_before_experts(mlp: Any, double: Any = lambda hidden: hidden * 2) -> None:
        mlp.experts.register_forward_pre_hook(lambda _, operands: (double(operands[0]), *operands[1:]))

    doubled_in_place = partial(doubled_before_experts, double=lambda hidden: hidden.mul_(2))
    for change in (doubled_before_dispatch, doubled_before_experts, doubled_in_place):
        dense, tiled = models()
        tile(tiled, TilingConfig(mlp_keep=0))
        assert_same(step(tiled, **inputs()), step(dense, **inputs()))
        assert all(layer.mlp.token_dispatcher.is_known for layer in tiled.decoder.layers)
        dispatch._say_kept_whole.cache_clear()
        with patch.object(dispatch, "log_on_rank_0") as log:
            for model in (dense, tiled):
                model.zero_grad()
                change(model.decoder.layers[0].mlp)
            for _ in range(2):
                assert_same(step(tiled, **inputs()), step(dense, **inputs()))
        log.assert_called_once_with(
            "warning: experts are given other rows than copies of tokens in order: they are kept whole"
        )
    dense, tiled = models()
    tile(tiled, TilingConfig(mlp_keep=0))
    with patch.object(MoEAllGatherTokenDispatcher, "token_dispatch", lambda _, hidden, probs: (hidden * 2, probs)):
        assert_same(step(tiled, **inputs()), step(dense, **inputs()))
    for layer in tiled.decoder.layers:
        assert layer.mlp.token_dispatcher.is_known is False and layer.mlp.token_dispatcher.remembered is None


def check_backward_hooks() -> None:
    """Full backward hooks give experts other tensors of the same memory: tokens are kept once, as the table says."""
    dense, tiled = models()
    assert table(tile(tiled, TilingConfig(mlp_keep=0))).count("tokens kept once") == 1
    seen: dict[Any, list[Tensor]] = {dense: [], tiled: []}
    for model, gradients in seen.items():
        experts = model.decoder.layers[1].mlp.experts
        experts.register_full_backward_hook(lambda _, grads, __, gradients=gradients: gradients.append(grads[0]))
    run_loop = tiled.decoder.layers[1].mlp.experts._run_loop = Mock(wraps=experts._run_loop)
    assert_same(step(tiled, **inputs()), step(dense, **inputs()))
    assert run_loop.call_args.args[-1] is not None
    torch.testing.assert_close(*seen.values())


def check_recomputed_layers() -> None:
    """By torch's own checkpoint, which counts the tensors that autograd saves."""
    dense, tiled = models()
    tile(tiled, TilingConfig(mlp_keep=0))
    for layer in (*dense.decoder.layers, *tiled.decoder.layers):
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)
    assert_same(step(tiled, **inputs()), step(dense, **inputs()))

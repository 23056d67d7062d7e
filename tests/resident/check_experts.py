"""Grouped experts, stock and tiled, in float64, and in whole models (``expert_models.py``): EP=2, expert TP=2, alone.

PYTHONPATH=tests/stand_ins torchrun --standalone --nproc-per-node 2 -m tests.resident.check_experts

With megatron-core 0.16 its GroupedMLP too.
"""

import copy
import itertools
from inspect import signature
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from megatron.core import __version__, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import experts as stock
from torch import Tensor
from transformer_engine.pytorch import GroupedLinear

from megatron_tiling import TilingConfig, tile
from megatron_tiling.report import LayerReport, table
from megatron_tiling.resident import experts as grouped
from megatron_tiling.tiles import grid
from tests.check_models import expect_error, make_config
from tests.resident import expert_models
from tests.support.harness import megatron

HIDDEN, FEATURES = 12, 10
SWIGLU = {"gated_linear_unit": True, "activation_func": F.silu}
CLAMPED = {"activation_func_clamp_value": 0.4, "glu_linear_offset": 1.0}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "swiglu": SWIGLU | {"bias_activation_fusion": True},
    "swiglu unfused, clamped": SWIGLU | CLAMPED,
    "quick geglu": SWIGLU | CLAMPED | {"activation_func": quick_gelu, "bias_activation_fusion": True},
    "gelu": {"activation_func": F.gelu},
    "squared relu": {"activation_func": squared_relu, "use_fused_weighted_squared_relu": True},
}
ROWS = ([3, 0, 9, 4], [0, 0, 0, 0], [0, 21, 0, 0], [4, 4, 4, 4])


def settings(**changes: Any) -> Any:
    sizes = {"tensor_model_parallel_size": 1, "hidden_size": HIDDEN, "moe_ffn_hidden_size": FEATURES}
    kind = {"params_dtype": torch.float64, "num_moe_experts": 4, "add_bias_linear": False, "moe_router_topk": 1}
    kind |= {"moe_router_pre_softmax": True}
    return make_config(**sizes | kind | changes)


def te_experts(**changes: Any) -> Any:
    config = settings(**changes)
    model_parallel_cuda_manual_seed(5)
    submodules: Any = getattr(stock, "GroupedMLPSubmodules", stock.MLPSubmodules)
    layers = {"linear_fc1": te.TEColumnParallelGroupedLinear, "linear_fc2": te.TERowParallelGroupedLinear}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return with_weights(stock.TEGroupedMLP(4, config, submodules(**layers), pg_collection=groups))


def with_weights(experts: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def copy_of(experts: Any) -> Any:
    """Of the parameters; process groups stay shared."""
    values = (value for module in experts.modules() for value in vars(module).values())
    shared = (torch.distributed.ProcessGroup, ProcessGroupCollection)
    return copy.deepcopy(experts, {id(value): value for value in values if isinstance(value, shared)})


def report_of(experts: Any, **options: Any) -> LayerReport:
    """Of these, tiled if they can be."""
    (report,) = tile(torch.nn.ModuleDict({"experts": experts}), TilingConfig(**options))
    return report


def tiled_of(experts: Any, tiles: int = 3, **options: Any) -> Any:
    """A copy, tiled."""
    copied = copy_of(experts)
    report = report_of(copied, splits={"experts": (1, tiles)}, **options)
    assert report.expert_tiles == tiles and report.module == "experts", report
    return copied


def run(experts: Any, rows: list[int], **options: Any) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(rows))
    hidden = torch.randn(sum(rows), HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    probs = torch.rand(sum(rows), generator=generator, dtype=torch.float64).requires_grad_()
    output, bias = experts(hidden, torch.tensor(rows), probs, **options)
    assert bias is None
    experts.zero_grad()
    (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad} | gradients


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Where stock has no gradient, tiled has none or zeros."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one = found[name]
        if one is None or value is None:
            assert (one is None or not one.any()) and (value is None or not value.any()), name
        else:
            torch.testing.assert_close(
                one, value, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


def check_values() -> None:
    for (name, activation), biased, on_input in itertools.product(ACTIVATIONS.items(), (False, True), (False, True)):
        if biased and name == "squared relu" and "use_fused_weighted_squared_relu" in activation:
            continue  # stock refuses it where fc1 does not add the bias
        changes = activation | {"add_bias_linear": biased, "moe_apply_probs_on_input": on_input}
        experts = te_experts(**changes | {"bias_dropout_fusion": False})
        for rows, keep in zip(ROWS, (0, 1, None, 2), strict=True):
            tiled = tiled_of(experts, mlp_keep=keep)
            assert not reason(tiled, rows)
            assert_equal(run(tiled, rows), run(experts, rows))


def reason(tiled: Any, rows: list[int], **buffers: Any) -> str:
    hidden = torch.zeros(sum(rows), HIDDEN, dtype=torch.float64)
    found: str = tiled.reason_for_stock_forward(hidden, hidden[:, 0], rows, tuple(buffers.values()))
    return found


class Adapted(torch.nn.Module):
    """Stands for an adapter of Megatron-Bridge's."""

    def __init__(self, to_wrap: Any) -> None:
        super().__init__()
        self.to_wrap = to_wrap

    def forward(self, hidden: Tensor, rows: list[int]) -> tuple[Tensor, None]:
        return 2 * self.to_wrap(hidden, rows)[0], None


def check_main_grad() -> None:
    """As with TransformerEngine's fused accumulation; biases' gradients stay where they were."""
    experts = te_experts(**SWIGLU, add_bias_linear=True, bias_dropout_fusion=False)
    expected, tiled = run(experts, ROWS[0]), tiled_of(experts, fuse_wgrad=True)
    for parameter in tiled.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones_like(parameter), False
    found = run(tiled, ROWS[0])
    for name, parameter in tiled.named_parameters():
        fused = "weight" in name
        assert parameter.grad_added_to_main_grad == fused, name
        if fused:
            found[name] = parameter.main_grad - 1
    assert_equal(found, expected)


def check_stock_forward() -> None:
    """Hooks see what they would see in stock's; what others give or replace is honoured."""
    experts = te_experts(**SWIGLU)
    expected = run(experts, ROWS[0])
    seen: list[Any] = []
    for change in (
        lambda tiled: tiled.linear_fc2.register_forward_hook(lambda *arguments: seen.append(arguments[1][0].shape)),
        lambda tiled: setattr(tiled.linear_fc1, "forward", tiled.linear_fc1.forward),
        lambda tiled: tiled.linear_fc1.weight1.requires_grad_(False),
    ):
        tiled = tiled_of(experts)
        change(tiled)
        assert reason(tiled, ROWS[0])
        found = run(tiled, ROWS[0])
        of_trained = {name: one for name, one in found.items() if one is not None}
        assert_equal(of_trained, {name: expected[name] for name in of_trained})
    assert seen == [(sum(ROWS[0]), FEATURES)]
    assert reason(tiled_of(experts), ROWS[0], output_buffer=torch.empty(1)) == "others give the memory of outputs"
    adapted = [copy_of(experts), tiled_of(experts)]
    for one in adapted:
        one.linear_fc2 = Adapted(one.linear_fc2)
    assert reason(adapted[1], ROWS[0]) == "linear_fc2 has an adapter around it"
    assert_equal(run(adapted[1], ROWS[0]), run(adapted[0], ROWS[0]))
    assert report_of(adapted[0]).reason == "linear_fc2 has an adapter around it"
    forward, tiled = stock.TEGroupedMLP.forward, tiled_of(experts)
    with patch.object(stock.TEGroupedMLP, "forward", lambda *operands, **buffers: forward(*operands, **buffers)):
        assert reason(tiled, ROWS[0]) == "TEGroupedMLP.forward is not Megatron's own"
        assert_equal(run(tiled, ROWS[0]), expected)
    product = GroupedLinear.forward
    with patch.object(GroupedLinear, "forward", lambda *operands, **options: 2 * product(*operands, **options)):
        words = "linear_fc1 has a GroupedLinear.forward that is not its own, but of "
        assert reason(tiled, ROWS[0]).startswith(words)
        assert_equal(run(tiled, ROWS[0]), run(experts, ROWS[0]))
        assert report_of(copy_of(experts)).reason.startswith(words)
    assert not reason(tiled, ROWS[0])
    tiled._apply_bias = lambda output, *_: output  # as without biases
    assert reason(tiled, ROWS[0]) == "TiledTEGroupedMLP._apply_bias is not Megatron's own"
    assert_equal(run(tiled, ROWS[0]), expected)
    operands = torch.ones(16, HIDDEN).double(), torch.tensor(ROWS[0]), torch.ones(1).double()  # probabilities of all
    unused = (None,) * (len(signature(forward).parameters) - 1 - len(operands))
    torch.testing.assert_close(tiled_of(experts)(*operands, *unused)[0], experts(*operands, *unused)[0])
    with pytest.raises(RuntimeError, match="split"):  # stock's, for a row of no expert
        tiled_of(experts)(torch.zeros(5, HIDDEN).double(), torch.tensor([1, 1, 1, 1]), torch.ones(5).double())


def check_reasons() -> None:
    """What stays stock says so in the table, and computes."""
    for changes, words in (
        ({"fp8": "hybrid"}, "--fp8-format hybrid: "),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser: "),
        ({"moe_paged_stash": True}, "--moe-paged-stash: "),
        ({"moe_mlp_glu_interleave_size": 32}, "--moe-mlp-glu-interleave-size 32: "),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute: "),
        ({"fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]}, "--offload-modules ['moe_act']"),
        ({"use_te_activation_func": True}, "--use-te-activation-func: "),
    ):
        experts = te_experts(**SWIGLU)
        vars(experts.config).update(changes)
        report = report_of(experts)
        assert type(experts) is stock.TEGroupedMLP and report.reason.startswith(words), report
        assert words in table([report]) and " dense " in table([report])
    flags = {"single_grouped_weight": "--moe-single-grouped-weight", "te_quant_params": "--te-precision"}
    for attribute, words in flags.items():
        experts = te_experts(**SWIGLU)
        setattr(experts.linear_fc2, attribute, True)
        assert report_of(experts).reason.startswith(words)
    experts = te_experts(**SWIGLU)
    experts.linear_fc1 = torch.nn.Sequential(experts.linear_fc1)
    assert report_of(experts).reason == "linear_fc1 is not a stock grouped layer but Sequential"
    experts = te_experts(**SWIGLU)
    assert report_of(experts, modules=("fc1", "fc2")).reason == "not in --tiled-linear-modules"
    assert report_of(experts, storage="partitioned").reason == "partitioned tiles are not of grouped experts"
    expect_error(lambda: report_of(experts, splits={"experts": (1, 2)}, mlp_keep=3), "within [0, 2]")


def check_table() -> None:
    experts = tiled_of(te_experts(**SWIGLU), tiles=2, mlp_keep=1)
    for _ in range(2):  # tiled now, or before
        row = table([report_of(experts)]).splitlines()[1].split(maxsplit=1)[1]
        words = "1 4 x 12 x 20 - - TiledExperts, at most 2 tiles of about as many rows, keep 1"
        assert row.split() == words.split(), row


def check_fewer_tiles_of_little_work() -> None:
    """Where all are kept, and nobody has said how many there are."""
    rows = [3, 4, 3, 2]
    for enough, options, tiles in (
        (1.0, {}, 4),
        (1e12, {}, 1),
        (1e12, {"factor": 3}, 3),
        (1e12, {"splits": {"experts": (1, 3)}}, 3),
        (1e12, {"mlp_keep": 2}, 4),
        (1e12, {"mlp_keep": 0}, 4),
    ):
        experts = te_experts(**SWIGLU)
        tiled = copy_of(experts)
        assert report_of(tiled, **options).expert_tiles == (4 if tiles == 1 else tiles)
        with patch.object(grid, "LEAST_TILE_OPERATIONS", enough):
            assert sum(group.count for group in tiled.groups(rows, FEATURES)) == tiles, (enough, options)
            assert_equal(run(tiled, rows), run(experts, rows))


def check_grouped_mlp() -> None:
    """megatron-core 0.16's own."""
    if not hasattr(stock, "GroupedMLP"):
        return
    stock.gg.assert_grouped_gemm_is_available = lambda: None

    def gmm(x: Tensor, weights: Tensor, rows: Tensor, trans_b: bool) -> Tensor:
        assert not trans_b
        return torch.cat([part @ weight for part, weight in zip(x.split(rows.tolist()), weights, strict=True)])

    stock.gg.ops = Mock(gmm=gmm)
    for changes in (SWIGLU, {"activation_func": F.gelu}, SWIGLU | {"moe_apply_probs_on_input": True}):
        config = settings(**changes)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts = with_weights(stock.GroupedMLP(4, config, pg_collection=groups))
        config.bf16 = True  # stock says that it computes nothing else
        for rows, keep in zip(ROWS, (0, 1, None, 2), strict=True):
            tiled = copy.copy(experts)  # the same parameters
            report_of(tiled, splits={"experts": (1, 3)}, mlp_keep=keep)
            assert isinstance(tiled, grouped.TILED_CLASSES[stock.GroupedMLP])
            assert_equal(run(tiled, rows), run(experts, rows))
    print("GroupedMLP: as stock", flush=True)


def exchange_on_a_cpu() -> None:
    """Stock brings the sizes to the host for GPUs alone, and leaves tensors, which gloo does not take."""
    exchange = torch.distributed.all_to_all_single

    def with_lists(output: Tensor, input_: Tensor, **options: Any) -> Any:
        sizes = {name: sizes.tolist() for name, sizes in options.items() if isinstance(sizes, Tensor)}
        return exchange(output, input_, **options | sizes)

    torch.distributed.all_to_all_single = with_lists


def main() -> None:
    spaces = globals(), vars(expert_models)
    checks = [check for space in spaces for name, check in space.items() if name.startswith("check_")]
    layouts = {"EP=2": {"expert_model_parallel_size": 2}, "expert TP=2": {"tensor_model_parallel_size": 2}, "alone": {}}
    exchange_on_a_cpu()
    with megatron():
        for name, sizes in layouts.items():
            if torch.distributed.get_world_size() == 1 and name != "alone":
                continue
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(**sizes)
            for check in checks if name == "alone" else [expert_models.check_models]:
                check()
            if torch.distributed.get_rank() == 0:
                print(f"experts, {name}: checks passed on megatron-core {__version__}", flush=True)


if __name__ == "__main__":
    main()

"""TiledMLP at one tensor-parallel size: all pairs of options equal stock, with stock's collectives.

torchrun --standalone --nproc-per-node TP -m tests.resident.check_mlp
"""

import copy
import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.resident.check_layers import weight_grad, weights
from tests.support.harness import GEMMS, Counter, all_pairs, megatron, naming, relative_error

TP = int(os.environ.get("WORLD_SIZE", "1"))
HIDDEN, FFN, SEQUENCE, BATCH = 12, 40, 8, 2
OPTIONS = {
    "sequence_parallel": [True, False],
    "built_sequence_parallel": [True, False],
    "expert": [True, False],
    "gated": [True, False],
    "bias": [True, False],
    "tiles": [1, 3, 4],
    "keep": [0, 1, None],
    "frozen": ["", "linear_fc1", "linear_fc2", "linear_fc1 linear_fc2"],
    "fusion": [True, False],
    "input_requires_grad": [True, False],
}


class Order(TorchDispatchMode):
    """The sequence of GEMMs and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" or name in GEMMS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def stock_mlp(case: dict[str, Any]) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    built_sequence_parallel = case["sequence_parallel"] or case.get("built_sequence_parallel", False)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=4,
        num_moe_experts=4 if case["expert"] else None,
        tensor_model_parallel_size=TP, expert_tensor_parallel_size=TP, add_bias_linear=case["bias"],
        sequence_parallel=built_sequence_parallel and TP > 1, params_dtype=torch.float64,
        gated_linear_unit=case["gated"], activation_func=F.silu, use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, submodules, is_expert=case["expert"], ffn_hidden_size=FFN)
    for layer in (mlp.linear_fc1, mlp.linear_fc2):  # as Megatron's set_model_to_sequence_parallel turns it off
        layer.sequence_parallel = case["sequence_parallel"] and TP > 1
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        if case["bias"]:  # the same on all ranks
            mlp.linear_fc2.bias.fill_(0.3)
    for name in case["frozen"].split():
        getattr(mlp, name).weight.requires_grad_(False)
    return mlp


def tiled_copy(mlp: Any, case: dict[str, Any]) -> Any:
    from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
    from megatron_tiling.resident.mlp import convert_mlp

    attributes = (value for module in mlp.modules() for value in vars(module).values())
    mlp = copy.deepcopy(mlp, {id(value): value for value in attributes if isinstance(value, dist.ProcessGroup)})
    if case["storage"] == "partitioned":
        return partitioned(mlp, case)
    mlp.linear_fc1.__class__, mlp.linear_fc2.__class__ = TiledColumnParallelLinear, TiledRowParallelLinear
    mlp.linear_fc1.set_tiles(1, case["tiles"])
    mlp.linear_fc2.set_tiles(case["tiles"], 1)
    assert convert_mlp(mlp, case["keep"]) == ""
    if case["fusion"]:
        for layer in (mlp.linear_fc1, mlp.linear_fc2):
            layer.gradient_accumulation_fusion = True
            layer.weight.main_grad = torch.zeros_like(layer.weight)
            layer.weight.grad_added_to_main_grad = False
    return mlp


def partitioned(mlp: Any, case: dict[str, Any]) -> Any:
    from megatron_tiling.partitioned.layers import make_partitioned
    from megatron_tiling.partitioned.mlp import PARTITIONED_MLP_CLASSES
    from megatron_tiling.resident.mlp import convert_mlp
    from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT, TileGrid

    fc1, fc2, tiles = mlp.linear_fc1, mlp.linear_fc2, case["tiles"]
    make_partitioned(fc1, TileGrid(HIDDEN, fc1.output_size_per_partition, 1, tiles, case["gated"], FEATURE_ALIGNMENT))
    make_partitioned(fc2, TileGrid(fc2.input_size_per_partition, HIDDEN, tiles, 1, False, FEATURE_ALIGNMENT))
    assert convert_mlp(mlp, case["keep"], PARTITIONED_MLP_CLASSES) == ""
    assert not list(fc1.tiles.parameters()) and len(mlp.tiles) == tiles
    return mlp


def gradients(mlp: Any) -> dict[str, Any]:
    """Of trainable parameters, by dense names."""
    grads = {
        name: getattr(parameter, "main_grad", parameter.grad)
        for name, parameter in mlp.named_parameters()
        if parameter.requires_grad and not name.startswith("tiles.")
    }
    for name in ("linear_fc1", "linear_fc2"):
        layer = getattr(mlp, name)
        if layer.weight is None and weights(layer)[0].requires_grad:
            grads[f"{name}.weight"] = weight_grad(layer, None)
    return grads


def run(mlp: Any, case: dict[str, Any]) -> tuple[dict[str, Any], Counter, Counter, list[str]]:
    """Results, the counts of forward and backward, and the order of backward."""
    generator = torch.Generator().manual_seed(3)
    sharded = case["sequence_parallel"] and TP > 1 and not case["expert"]
    tokens = (SEQUENCE * BATCH,) if case["expert"] else (SEQUENCE // TP if sharded else SEQUENCE, BATCH)
    hidden = torch.randn(*tokens, HIDDEN, generator=generator, dtype=torch.float64)
    if sharded:
        hidden += 0.1 * dist.get_rank()
    hidden.requires_grad_(case["input_requires_grad"])
    scale = torch.rand(*tokens, generator=generator, dtype=torch.float64).requires_grad_() if case["expert"] else None
    with Counter() as forward:
        output, bias = mlp(hidden) if scale is None else mlp(hidden, scale)
    with Counter() as backward, Order() as order:
        if output.requires_grad:
            output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    found = {"output": output, "bias": bias, "hidden": hidden.grad, "scale": getattr(scale, "grad", None)}
    found |= gradients(mlp)
    return found, forward, backward, order.names


def check(case: dict[str, Any]) -> None:
    stock = stock_mlp(case)
    mlp = tiled_copy(stock, case)
    assert not mlp.reason_for_stock_forward()
    expected, stock_forward, stock_backward, _ = run(stock, case)
    found, forward, backward, order = run(mlp, case)
    for name, value in expected.items():
        if value is None and name == "linear_fc1.bias":
            continue  # stock's frozen path drops the gradient of a trainable bias; ours does not
        assert (found[name] is None) == (value is None), f"{name}: stock {value}, tiled {found[name]}"
        if value is not None:
            error = relative_error(found[name], value)
            assert error < 1e-11, f"{name}: relative error {error:.1e}"
    assert forward.collectives == stock_forward.collectives, (forward.collectives, stock_forward.collectives)
    same_work = case["input_requires_grad"] and ("fc1" not in case["frozen"] or case["keep"] is None)
    if same_work:
        assert backward.collectives == stock_backward.collectives, (backward.collectives, stock_backward.collectives)
    reductions = [index for index, name in enumerate(order) if name in ("allreduce_", "_reduce_scatter_base_")]
    if case["storage"] == "resident" and same_work and reductions and "fc1" not in case["frozen"]:
        assert set(order[reductions[-1] + 1 :]) & set(GEMMS), "nothing runs under the reduction of the input gradient"


def check_fewer_tiles(sequence_parallel: bool) -> None:
    """The tokens of all ranks count."""
    from megatron_tiling.resident import mlp as resident
    from megatron_tiling.tiles import grid

    case = dict.fromkeys(OPTIONS, False) | {"tiles": 4, "keep": None, "gated": True, "frozen": ""}
    case |= {"sequence_parallel": sequence_parallel, "input_requires_grad": True, "storage": "resident"}
    stock = stock_mlp(case)
    mlp = tiled_copy(stock, case)
    mlp.linear_fc1.fewer_if_small = mlp.linear_fc2.fewer_if_small = True
    work = 6 * SEQUENCE * BATCH * (stock.linear_fc1.weight.numel() + stock.linear_fc2.weight.numel())
    spied = patch.object(resident, "adapted_mlp", wraps=resident.adapted_mlp)
    for tiles in (1, 2, 3, 4):
        with patch.object(grid, "LEAST_TILE_OPERATIONS", work / (tiles + 0.5)), spied as loops:
            found, expected = run(mlp, case)[0], run(stock, case)[0]
        assert len(loops.call_args.args[-1].parts) - 1 == tiles
        for parameter in (*mlp.parameters(), *stock.parameters()):
            parameter.grad = None
        for name, value in expected.items():
            assert value is None or relative_error(found[name], value) < 1e-11, name


def main() -> None:
    with megatron(tensor_model_parallel_size=TP, expert_tensor_parallel_size=TP):
        from megatron_tiling.tiles import mlp_tiles

        mlp_tiles.TOKEN_MULTIPLE = 2
        cases = [case | {"storage": "resident"} for seed in range(4) for case in all_pairs(OPTIONS, seed)]
        cases += [case | {"storage": "partitioned"} for seed in (4, 5) for case in all_pairs(OPTIONS, seed)]
        for case in cases:
            case["bias"] &= not case["expert"]  # stock refuses it under expert tensor parallelism
            with naming(f"TP={TP}, {case}"):
                check(case)
        for sequence_parallel in (False, True):
            check_fewer_tiles(sequence_parallel)
        if dist.get_rank() == 0:
            print(f"{len(cases)} cases passed at TP={TP}")


if __name__ == "__main__":
    main()

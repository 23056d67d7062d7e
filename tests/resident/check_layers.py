"""Every option of the stock layers, in all pairs, at one tensor-parallel size: tiled equals stock.

    torchrun --standalone --nproc-per-node TP -m tests.resident.check_layers

The same weights, outputs and gradients (to rounding), the same number of collectives, one GEMM a tile.
"""

import os
from typing import Any

import torch

from tests.support.harness import Counter, all_pairs, megatron, naming, relative_error

TP = int(os.environ.get("WORLD_SIZE", "1"))
IN, OUT, SEQUENCE, BATCH = 24, 40, 8, 2
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}

COMMON = {
    "bias": [True, False],
    "skip_bias_add": [True, False],
    "is_expert": [False, True],
    "frozen": [False, True],
    "fusion": [False, True],
    "explicit_group": [False, True],
    "init": ["cpu", "gpu", "none"],
    "dtype": [torch.float32, torch.bfloat16],
    "grid": [(1, 1), (1, 3), (5, 1), (2, 4)],
    "fp32_accumulate": [False, True],
    "input_requires_grad": [True, False],
    "shape": [(SEQUENCE, BATCH), (SEQUENCE,), ()],
    "micro_batches": [1, 2],
}
COLUMN = COMMON | {
    "gather": ["no", "layer", "at runtime", "layer, not at runtime"],
    "sequence_parallel": [False, True],
    "disable_grad_reduce": [False, True],
    "weight_argument": [False, True],
    "stride": [1, 2],
    "combine": [True, False],
}
ROW = COMMON | {
    "sequence_parallel": [False, True],
    "input_is_parallel": [True, False],
    "input_as_list": [False, True],
}


def make_config(case: dict[str, Any]) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=IN,
        num_attention_heads=4,
        num_moe_experts=4,
        add_bias_linear=False,  # a model-wide setting; the layers here are told one by one
        tensor_model_parallel_size=TP,
        expert_model_parallel_size=2 if TP == 4 else 1,
        expert_tensor_parallel_size=2 if TP == 4 else TP,
        sequence_parallel=case["sequence_parallel"] and TP > 1,
        params_dtype=case["dtype"],
        use_cpu_initialization=case["init"] == "cpu",
        perform_initialization=case["init"] != "none",
        gradient_accumulation_fusion=False,
    )


def groups(case: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    if not case["explicit_group"]:
        return {}
    if case["is_expert"]:
        return {"tp_group": parallel_state.get_expert_tensor_parallel_group()}
    return {"tp_group": parallel_state.get_tensor_model_parallel_group()}


def build(case: dict[str, Any], kind: str) -> tuple[Any, Any]:
    """A stock layer and a tiled one, each drawn from the same random state."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_tiling import TiledColumnParallelLinear, TiledRowParallelLinear
    from megatron_tiling.partitioned.layers import PartitionedColumnParallelLinear, PartitionedRowParallelLinear

    partitioned = case["storage"] == "partitioned"
    tiled_class: type = {
        "column": PartitionedColumnParallelLinear if partitioned else TiledColumnParallelLinear,
        "row": PartitionedRowParallelLinear if partitioned else TiledRowParallelLinear,
    }[kind]
    options: dict[str, Any] = {
        "config": make_config(case),
        "init_method": lambda weight: torch.nn.init.normal_(weight, std=0.5),
        "bias": case["bias"],
        "skip_bias_add": case["skip_bias_add"],
        "is_expert": case["is_expert"],
        **groups(case),
    }
    tiling: dict[str, Any] = {
        "in_splits": case["grid"][0],
        "out_splits": case["grid"][1],
        "fp32_accumulate": case["fp32_accumulate"],
    }
    if kind == "column":
        options |= {
            "gather_output": case["gather"].startswith("layer"),
            "disable_grad_reduce": case["disable_grad_reduce"],
            "skip_weight_param_allocation": case["weight_argument"],
            "stride": case["stride"],
        }
        tiling["combine_out_splits"] = case["combine"]
    else:
        options["input_is_parallel"] = case["input_is_parallel"]
    layers = []
    for cls, extra in (
        (ColumnParallelLinear if kind == "column" else RowParallelLinear, {}),
        (tiled_class, tiling),
    ):
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(11)
        layers.append(cls(IN, OUT, **options, **extra))
    stock, tiled = layers
    if case["init"] == "none":  # memory as it came
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.normal_()
        tiled.load_state_dict(stock.state_dict())
    assert stock.state_dict().keys() == tiled.state_dict().keys()
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, tiled.state_dict()[name]), f"{name} is not drawn alike"
        for twin in weights(tiled) if name == "weight" else [tiled.bias]:
            for attribute in (
                "tensor_model_parallel",
                "partition_dim",
                "partition_stride",
                "allreduce",
                "sequence_parallel",
            ):
                assert getattr(parameter, attribute, None) == getattr(twin, attribute, None), (name, attribute)
    if case["bias"]:
        with torch.no_grad():
            tiled.bias.copy_(stock.bias.normal_())
    return stock, tiled


def weights(layer: Any) -> list[Any]:
    """The weight, or the tiles of a partitioned one."""
    if layer.weight is not None:
        return [layer.weight]
    return [tile.weight for row in layer.tiles.linears for tile in row]


def weight_grad(layer: Any, weight: Any) -> Any:
    """The gradient of the weight, also where it is in tiles."""
    if weight is not None:
        return weight.grad
    dense = torch.zeros(layer.grid.out_features, layer.grid.in_features, dtype=weights(layer)[0].dtype)
    for o, row in enumerate(layer.tiles.linears):
        for i, tile in enumerate(row):
            if tile.weight.grad is None:
                return None
            parts = tile.weight.grad.split([rows.stop - rows.start for rows in layer.grid.row_ranges(o)])
            for rows, part in zip(layer.grid.row_ranges(o), parts, strict=True):
                dense[rows, layer.grid.columns(i)] = part
    return dense


def run(layer: Any, case: dict[str, Any], kind: str, tiled: bool) -> dict[str, Any]:
    """Forward and backward; what came out, with the counts."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    weight = layer.weight
    if kind == "column" and case["weight_argument"]:
        shape = (layer.output_size_per_partition, IN)
        own = torch.Generator().manual_seed(100 + rank)
        weight = torch.nn.Parameter(torch.randn(*shape, generator=own).to(case["dtype"]))
    for parameter in weights(layer) if weight is layer.weight else [weight]:
        parameter.requires_grad_(not case["frozen"])
    fused = case["fusion"] and tiled  # stock has no fusion without apex: its plain gradient is the reference
    if fused:
        layer.gradient_accumulation_fusion = True
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    leading = list(case["shape"])
    gathers = layer.sequence_parallel and not layer.explicit_expert_comm
    features = IN
    if kind == "column":
        if gathers:
            leading[0] //= TP
    elif case["input_is_parallel"]:
        features = layer.input_size_per_partition
    x = torch.randn(*leading, features, generator=generator).to(case["dtype"])
    if kind == "row" or gathers:
        x = x + 0.1 * rank if kind == "column" or case["input_is_parallel"] else x
    x.requires_grad_(case["input_requires_grad"])
    given: Any = x
    if kind == "row" and tiled and case["input_as_list"] and case["input_is_parallel"]:
        given = [x[..., layer.grid.columns(i)] for i in range(layer.grid.in_splits)]
    arguments: dict[str, Any] = {}
    if kind == "column" and case["weight_argument"]:
        arguments["weight"] = weight
    if kind == "column" and case["gather"].endswith("at runtime"):
        arguments["runtime_gather_output"] = case["gather"] == "at runtime"

    if not tiled and case["shape"] == ():  # stock's backward pass fails on 1-D inputs: one token stands for them
        given = x[None]
    for _ in range(case["micro_batches"]):
        with Counter() as forward:
            output, output_bias = layer(given, **arguments)
        if isinstance(output, list):
            assert len(output) == layer.grid.out_splits
            assert [part.shape[-1] for part in output] == [layer.grid.out_size(o) for o in range(len(output))]
            output = torch.cat(output, dim=-1)
        output = output.reshape(*output.shape[-len(case["shape"]) - 1 :])
        backward = Counter()
        if output.requires_grad:
            upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
            with backward:
                output.backward(upstream)
    results: dict[str, Any] = {"output": output.detach(), "returned bias": output_bias}
    results |= {"input grad": x.grad, "bias grad": None if layer.bias is None else layer.bias.grad}
    wgrad = weight_grad(layer, weight)
    if fused and not case["frozen"]:
        assert weight.grad_added_to_main_grad, "DDP would add the placeholder gradient"
        wgrad = weight.main_grad
    results["weight grad"] = wgrad
    results["forward"], results["backward"] = forward, backward
    return results


def check(case: dict[str, Any], kind: str) -> None:
    stock_layer, tiled_layer = build(case, kind)
    stock, tiled = run(stock_layer, case, kind, False), run(tiled_layer, case, kind, True)
    limit = TOLERANCE[case["dtype"]]
    for name in ("output", "returned bias", "input grad", "weight grad", "bias grad"):
        expected, actual = stock[name], tiled[name]
        if name == "bias grad" and case["frozen"]:
            continue  # stock's frozen path drops the gradient of a trainable bias; ours does not
        assert (expected is None) == (actual is None), f"{name}: stock {expected}, tiled {actual}"
        if expected is not None:
            error = relative_error(actual, expected)
            assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"
    tiles = tiled_layer.grid.tiles
    assert tiled["forward"].gemms == tiles, f"{tiled['forward'].gemms} forward GEMMs for {tiles} tiles"
    passes = case["input_requires_grad"] + (not case["frozen"])
    assert tiled["backward"].gemms == tiles * passes, f"{tiled['backward'].gemms} backward GEMMs, {tiles} x {passes}"
    assert stock["forward"].collectives == tiled["forward"].collectives, "forward collectives"
    if case["input_requires_grad"]:  # without it, stock still computes and reduces a gradient that nobody gets
        assert stock["backward"].collectives == tiled["backward"].collectives, (
            f"backward collectives: stock {stock['backward'].collectives}, tiled {tiled['backward'].collectives}"
        )
    if case["storage"] == "resident":
        check_standalone(tiled_layer, case)


def check_standalone(layer: Any, case: dict[str, Any]) -> None:
    """`layer.tiles` describes the grid and computes the shard's product; it owns no parameters."""
    if layer.weight is None:
        return
    tiles = layer.tiles
    assert not list(tiles.parameters()) and not any(layer.tiles is child for child in layer.modules())
    assert sum(tile.weight.numel() for row in tiles.linears for tile in row) == layer.weight.numel()
    x = torch.randn(3, layer.grid.in_features).to(case["dtype"])
    given = [x[:, layer.grid.columns(i)] for i in range(layer.grid.in_splits)]
    result = tiles(given if tiles.input_is_already_split else x)
    output = torch.cat([part for part, _ in result], -1) if isinstance(result, list) else result[0]
    assert relative_error(output, x @ layer.weight.t()) <= TOLERANCE[case["dtype"]]


def valid(case: dict[str, Any], kind: str) -> dict[str, Any]:
    """The case without combinations that stock Megatron itself, or a partitioned layer, refuses."""
    case = dict(case)
    if case["storage"] == "partitioned":
        case |= {"fusion": False, "fp32_accumulate": False, "weight_argument": False}
    if kind == "column":
        if not case["combine"]:
            case["gather"] = "no"
    elif case["sequence_parallel"]:
        case["input_is_parallel"] = True
    expert_comm = case["is_expert"] and TP > 1
    if expert_comm and kind == "row":
        case["skip_bias_add"] = True
    if case["sequence_parallel"] and TP > 1 and case["shape"] == ():
        case["shape"] = (SEQUENCE,)
    return case


def main() -> None:
    sizes = {"tensor_model_parallel_size": TP}
    if TP == 4:
        sizes |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    with megatron(**sizes):
        count = 0
        for kind, options in (("column", COLUMN), ("row", ROW)):
            cases = [case | {"storage": "resident"} for seed in range(3) for case in all_pairs(options, seed)]
            cases += [case | {"storage": "partitioned"} for case in all_pairs(options, seed=3)]
            for case in cases:
                case = valid(case, kind)
                with naming(f"{kind} layer, TP={TP}, {case}"):
                    check(case, kind)
                count += 1
        if torch.distributed.get_rank() == 0:
            print(f"{count} cases passed at TP={TP}")


if __name__ == "__main__":
    main()

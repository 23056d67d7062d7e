"""TiledMLP with its communication behind products: bit for bit as with blocking collectives, and close to without.

torchrun --standalone --nproc-per-node TP -m tests.resident.check_overlap
"""

import copy
import os
from typing import Any

import torch
import torch.distributed as dist

from tests.resident.check_mlp import HIDDEN, TP, gradients, stock_mlp
from tests.support.harness import all_pairs, megatron, naming, peak_bytes, relative_error

BATCH = 2
OPTIONS = {
    "sequence_parallel": [True, False],
    "gated": [True, False],
    "bias": [True, False],
    "steps": [2, 3, 5],
    "rows": [24, 20],  # of all ranks; not a multiple of every number of steps
    "keep": [0, None],
    "frozen": ["", "linear_fc1", "linear_fc2", "linear_fc1 linear_fc2"],
    "fusion": [True, False],
    "input_requires_grad": [True, False],
    "dtype": [torch.float64, torch.float32, torch.bfloat16],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def tiled_copy(mlp: Any, case: dict[str, Any], steps: int | None, transport: str = "auto") -> Any:
    from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
    from megatron_tiling.resident.mlp import convert_mlp

    attributes = (value for module in mlp.modules() for value in vars(module).values())
    mlp = copy.deepcopy(mlp, {id(value): value for value in attributes if isinstance(value, dist.ProcessGroup)})
    mlp.linear_fc1.__class__, mlp.linear_fc2.__class__ = TiledColumnParallelLinear, TiledRowParallelLinear
    mlp.linear_fc1.set_tiles(1, 4)
    mlp.linear_fc2.set_tiles(4, 1)
    assert convert_mlp(mlp, case["keep"], overlap_steps=steps) == ""
    mlp.transport = transport
    if case["fusion"]:
        for layer in (mlp.linear_fc1, mlp.linear_fc2):
            layer.gradient_accumulation_fusion = True
            wide = torch.promote_types(case["dtype"], torch.float32)
            layer.weight.main_grad = torch.ones_like(layer.weight, dtype=wide)
            layer.weight.grad_added_to_main_grad = False
    return mlp


def tokens(case: dict[str, Any]) -> torch.Tensor:
    rows = case["rows"] // TP if case["sequence_parallel"] else case["rows"]
    generator = torch.Generator().manual_seed(3 + dist.get_rank() * case["sequence_parallel"])
    hidden = torch.randn(rows, BATCH, HIDDEN, generator=generator, dtype=torch.float64).to(case["dtype"])
    return hidden.requires_grad_(case["input_requires_grad"])


def run(mlp: Any, case: dict[str, Any], passes: int = 1) -> dict[str, Any]:
    """Output and gradients of ``passes`` backward passes over one graph."""
    hidden = tokens(case)
    output, bias = mlp(hidden)
    if output.requires_grad:
        generator = torch.Generator().manual_seed(5 + dist.get_rank() * case["sequence_parallel"])
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        for left in reversed(range(passes)):
            output.backward(upstream, retain_graph=left > 0)
    return {"output": output.detach(), "bias": bias, "hidden": hidden.grad} | gradients(mlp)


def check(case: dict[str, Any]) -> None:
    stock = stock_mlp(case | {"expert": False}).to(case["dtype"])
    mlp, blocking = (tiled_copy(stock, case, case["steps"], how) for how in ("auto", "blocking"))
    plain = tiled_copy(stock, case, None)
    assert not mlp.reason_for_stock_forward()
    assert mlp.steps_now(tokens(case), None) == case["steps"] and plain.steps_now(tokens(case), None) == 1
    expected, found, without = run(blocking, case), run(mlp, case), run(plain, case)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None) == (without[name] is None), name
        if value is not None:
            assert torch.equal(found[name], value), f"{name}: other bits than with blocking collectives"
            error = relative_error(found[name], without[name])
            assert error < TOLERANCE[case["dtype"]], f"{name}: {error:.1e} from the MLP without overlap"
    needs_input = "fc1" not in case["frozen"] or case["keep"] == 0
    if case["dtype"] == torch.float64 and needs_input:  # a second pass over one graph, which kept pre-activations lose
        twice, doubled = (run(tiled_copy(stock, case, steps), case, passes=2) for steps in (case["steps"], None))
        for name, value in doubled.items():
            assert value is None or relative_error(twice[name], value) < 1e-12, f"{name}, of two backward passes"


def check_memory() -> None:
    """What 0 kept tiles hold of pre-activations and activations is of a step, not of all tokens."""
    from megatron_tiling.tiles.step_comm import cut

    case = dict.fromkeys(("sequence_parallel", "gated", "input_requires_grad"), True) | {"bias": False, "frozen": ""}
    case |= {"keep": 0, "fusion": True, "rows": 480, "dtype": torch.float64, "expert": False}
    peaks = []
    for steps in (2, 12):
        mlp = tiled_copy(stock_mlp(case), case, steps)
        peaks.append(peak_bytes(lambda mlp=mlp: run(mlp, case)))
    cuts = [cut(case["rows"] // TP, BATCH, TP, steps) for steps in (2, 12)]
    largest = [max(step.tokens.stop - step.tokens.start for step in steps) for steps in cuts]
    less = (largest[0] - largest[1]) * 3 * mlp.linear_fc2.weight.shape[1] * 8
    assert peaks[0] - peaks[1] > 0.9 * less, (peaks, less)


def check_what_runs_as_before() -> None:
    """Few tokens, a scale for each token, layers that communicate otherwise than each other: one step."""
    case = {name: values[0] for name, values in OPTIONS.items()}
    mlp = tiled_copy(stock_mlp(case | {"expert": False}), case, 4)
    hidden = tokens(case)
    assert mlp.steps_now(hidden, None) == 4
    assert mlp.steps_now(hidden, torch.ones(hidden.shape[:-1])) == 1
    mlp.linear_fc2.sequence_parallel = False
    assert mlp.steps_now(hidden, None) == 1
    mlp.linear_fc2.sequence_parallel = True
    few = step_comm().LEAST_STEP_TOKENS * 3 // TP // BATCH
    assert mlp.steps_now(hidden[:few], None) == 3 and mlp.steps_now(hidden[:1], None) == 1


def check_models() -> None:
    """What the table says is what runs; MLPs in a model, dense against tiled."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import note
    from tests.check_models import assert_same, batch, gpt, make_config, step

    config = {"tensor_model_parallel_size": TP, "sequence_parallel": True}
    dense, tiled = gpt(make_config(**config)), gpt(make_config(**config))
    reports = tile(tiled, TilingConfig(factor=2, tp_overlap=3))
    notes = {report.name.rpartition(".")[2]: note(report) for report in reports if report.is_tiled}
    words = f"at most 3 token steps, communication behind products from {2 * step_comm().LEAST_STEP_TOKENS} tokens on"
    assert notes["linear_fc1"] == notes["linear_fc2"] == f"TiledMLP, keep all, {words}", notes
    seen = []
    for layer in tiled.decoder.layers:
        layer.mlp._in_steps = lambda hidden, steps, run=layer.mlp._in_steps: seen.append(steps) or run(hidden, steps)
    found, expected = step(tiled, **batch()), step(dense, **batch())
    assert_same(found, expected)
    assert seen == [3, 3], seen


def step_comm() -> Any:
    from megatron_tiling.tiles import step_comm

    return step_comm


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        from megatron_tiling.tiles import mlp_tiles

        mlp_tiles.TOKEN_MULTIPLE = step_comm().TOKEN_MULTIPLE = 2
        step_comm().LEAST_STEP_TOKENS = 8
        cases = [case for seed in range(int(os.environ.get("SEEDS", "2"))) for case in all_pairs(OPTIONS, seed)]
        for case in cases:
            with naming(f"TP={TP}, {case}"):
                check(case)
        check_what_runs_as_before()
        check_memory()
        check_models()
        if dist.get_rank() == 0:
            print(f"{len(cases)} cases passed at TP={TP}")


if __name__ == "__main__":
    main()

"""The FP8 tile loop on a CPU, with TransformerEngine's quantizers and GEMM in torch, on one rank and on several.

torchrun --standalone --nproc-per-node TP -m tests.resident.check_fp8_cpu FOLDER: see check_transformer_engine_cpu.
"""

import os
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.resident.check_transformer_engine_cpu import prepare
from tests.support.harness import all_pairs, leave

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
HIDDEN, FFN, SEQUENCE, BATCH = 128, 1024, 512, 2
OPTIONS = {
    "recipe": ["tensorwise", "blockwise", "delayed"],
    "tiles": [1, 2, 4],
    "keep": [0, 1, 4],
    "hold": [True, False],
    "quantized_weights": [True, False],
    "save_input": [True, False],
    "fuse": [True, False],
    "bias": [True, False],
    "scaled": [True, False],
    "fp32_accumulate": [True, False],
    "frozen": ["", "fc1", "fc2"],
    "sequence_parallel": [True, False],
}


def swiglu(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    gate, up = (pre if bias is None else pre + bias).chunk(2, -1)
    activated = F.silu(gate) * up
    return activated if scale is None else (activated * scale.unsqueeze(-1)).to(activated.dtype)


def quantized_parameter(weight: Tensor, recipe: str) -> torch.nn.Parameter:
    """As ``--fp8-param-gather`` has it."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    from tests.support import fp8_on_cpu

    by = fp8_on_cpu.quantizer(recipe, weight=True)
    by.set_usage(rowwise=True, columnwise=False)
    kind = Float8BlockwiseQTensor if recipe == "blockwise" else Float8Tensor
    fields = fp8_on_cpu.quantize(weight, by).get_metadata()
    fields.pop("fake_dtype")
    return torch.nn.Parameter(kind(shape=weight.shape, dtype=weight.dtype, device=weight.device, **fields))


def run(case: dict[str, Any]) -> None:
    from megatron_tiling.resident import fp8_loop as loops
    from megatron_tiling.resident.fp8_operands import WeightCopies
    from megatron_tiling.tiles.activation import Activation
    from tests.support import fp8_on_cpu

    recipe, group = case["recipe"], dist.group.WORLD if RANKS > 1 else None
    sequence_parallel = case["sequence_parallel"] and RANKS > 1
    gathering = group if sequence_parallel else None
    features = FFN // RANKS

    def draw(*shape: int, factor: float = 1.0, seed: int = 0) -> Tensor:
        return factor * torch.randn(*shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(seed))

    def shard(tensor: Tensor) -> Tensor:
        return tensor.chunk(RANKS)[RANK].contiguous() if sequence_parallel else tensor

    hidden, grad_output = draw(SEQUENCE, BATCH, HIDDEN, seed=1), draw(SEQUENCE, BATCH, HIDDEN, seed=2)
    shapes = {"fc1": (2 * features, HIDDEN), "fc2": (HIDDEN, features)}
    weights: Any = {name: torch.nn.Parameter(draw(*shape, factor=0.1, seed=3 + RANK)) for name, shape in shapes.items()}
    exact = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    if case["quantized_weights"]:
        weights = {name: quantized_parameter(weight.detach(), recipe) for name, weight in weights.items()}
    layers = {}
    for name, weight in weights.items():
        weight.requires_grad_(name != case["frozen"])
        if case["fuse"]:
            weight.main_grad = torch.zeros(weight.shape)
        by = [fp8_on_cpu.quantizer(recipe, group=gathering if name == which else None) for which in ("fc1", "fc2")]
        copies = WeightCopies(fp8_on_cpu.quantizer(recipe, weight=True), case["hold"])
        saves = case["save_input"] and name == "fc1" and recipe != "delayed"
        layers[name] = loops.FP8Linear(by[0], by[1], copies, case["fuse"], group, sequence_parallel, saves)
    tiles = case["tiles"]
    loop = loops.FP8Loop(
        parts=[index * features // tiles for index in range(tiles + 1)],
        activation=Activation(True, swiglu),
        keep=min(case["keep"], tiles),
        fp32_accumulate=case["fp32_accumulate"],
        fc1=layers["fc1"],
        fc2=layers["fc2"],
        split_accumulators=(False, True, True),
    )
    others: dict[str, Tensor | None] = {"bias": None, "scale": None}
    if case["bias"]:
        others["bias"] = draw(2 * features, seed=5 + RANK).requires_grad_()
    if case["scaled"]:
        others["scale"] = torch.rand(SEQUENCE * BATCH, generator=torch.Generator().manual_seed(6)).requires_grad_()
    x = shard(hidden).clone().requires_grad_()
    output = loops.fp8_mlp(x, weights["fc1"], others["bias"], weights["fc2"], others["scale"], loop)
    output.backward(shard(grad_output))

    leaves = {"hidden": hidden.double().requires_grad_(), **exact}
    leaves |= {name: other.detach().double().requires_grad_() for name, other in others.items() if other is not None}
    activated = swiglu(leaves["hidden"].flatten(0, 1) @ exact["fc1"].t(), leaves.get("bias"), leaves.get("scale"))
    expected_output = (activated @ exact["fc2"].t()).view_as(hidden)
    grads = torch.autograd.grad(expected_output, list(leaves.values()), grad_output.double())
    expected = {"output": expected_output.detach(), **dict(zip(leaves, grads, strict=True))}
    for name in ("output", "hidden"):
        if RANKS > 1:
            dist.all_reduce(expected[name])
        expected[name] = shard(expected[name])
    found = {"output": output.detach(), "hidden": x.grad}
    found |= {name: weight.main_grad if case["fuse"] else weight.grad for name, weight in weights.items()}
    found |= {name: other.grad for name, other in others.items() if other is not None}
    for name, value in expected.items():
        if name == case["frozen"]:
            assert weights[name].grad is None
            continue
        if name == "scale" and RANKS > 1:  # the sum over ranks is others'
            continue
        error = float((found[name].double() - value).norm() / value.norm())
        assert error < 0.09, f"{case}: {name}: {error:.3f}"


def check_operands() -> None:
    """With blocks, cuts at multiples of 128 give the operands of the whole, data and scales."""
    from megatron_tiling.resident import fp8_operands as operands
    from tests.support import fp8_on_cpu

    tensor = torch.randn(512, 1920, dtype=torch.bfloat16)
    cuts = [slice(*cut) for cut in pairwise((0, 640, 1280, 1920))]
    by, of_weight = fp8_on_cpu.quantizer("blockwise"), fp8_on_cpu.quantizer("blockwise", weight=True)
    whole = operands.quantized(by, tensor, rowwise=True, columnwise=True)
    parts = [operands.quantized(by, tensor[:, cut], columnwise=True) for cut in cuts]
    joined = operands.joined(parts)
    assert torch.equal(joined._columnwise_data, whole._columnwise_data)
    assert torch.equal(joined._columnwise_scale_inv, whole._columnwise_scale_inv)
    for cut, part in zip(cuts, parts, strict=True):
        found = operands.columns_of(joined, cut)
        assert torch.equal(found._columnwise_data, part._columnwise_data)
        assert torch.equal(found._columnwise_scale_inv, part._columnwise_scale_inv)
    weight = operands.quantized(of_weight, tensor, rowwise=True)
    weight.update_usage(rowwise_usage=True, columnwise_usage=True)
    for cut in cuts:
        rows = slice(cut.start // 5, cut.stop // 5)  # multiples of 128
        part, expected = operands.rows_of(weight, rows), operands.quantized(of_weight, tensor[rows], rowwise=True)
        assert torch.equal(part._rowwise_data, expected._rowwise_data)
        assert torch.equal(part._rowwise_scale_inv, expected._rowwise_scale_inv)
        part, expected = operands.columns_of(weight, cut), operands.quantized(of_weight, tensor[:, cut], rowwise=True)
        assert torch.equal(part._columnwise_data.t(), expected._rowwise_data)
        blocks = (cut.stop - cut.start) // 128  # without padding
        assert torch.equal(part._columnwise_scale_inv.t()[:4], expected._rowwise_scale_inv[:, :blocks])


def check_micro_batches() -> None:
    """Of a step of the optimizer: the first one's scale, whatever delayed scaling has come to since, and its notes."""
    from megatron_tiling.resident.fp8_operands import WeightCopies
    from tests.support import fp8_on_cpu

    weight = torch.randn(512, 256, dtype=torch.bfloat16)
    everything, halves = [slice(0, 512)], [slice(128, 256), slice(384, 512)]
    for recipe, hold, is_quantized in product(OPTIONS["recipe"], (False, True), (False, True)):
        by = fp8_on_cpu.quantizer(recipe, weight=True)
        source = quantized_parameter(weight, recipe) if is_quantized else weight
        copies = WeightCopies(by, hold)
        first = fp8_on_cpu.rows_of(copies.rows(source, everything))
        assert (first - weight).norm() < 0.05 * weight.norm()
        if recipe == "delayed" and not is_quantized:
            assert by.amax == weight.abs().max()
            by.amax.zero_()
            by.scale.fill_(2.0)
        expected = torch.cat([first[rows] for rows in halves])
        tile, columns = copies.rows(source, halves), copies.rows(source, halves, rowwise=False, columnwise=True)
        assert torch.equal(fp8_on_cpu.rows_of(tile), expected)
        assert torch.equal(fp8_on_cpu.columns_of(columns), expected.t())
        if copies.makes_columns(source):
            part = slice(128, 256) if recipe == "blockwise" else slice(16, 64)
            assert torch.equal(fp8_on_cpu.columns_of(copies.columns(source, part)), first[:, part].t())
        else:
            assert hold or (recipe == "blockwise" and is_quantized)
        assert torch.equal(fp8_on_cpu.rows_of(copies.rows(source, everything)), first)
        assert (columns is tile) == hold
        assert recipe != "delayed" or is_quantized or by.amax == 0


def main() -> None:
    folder = Path(sys.argv[1])
    environment = dict(os.environ)
    prepare(folder)
    os.environ.update(environment)
    from transformer_engine.pytorch import distributed

    from megatron_tiling.resident import fp8_loop
    from tests.support import fp8_on_cpu

    fp8_on_cpu.install(fp8_loop)
    dist.init_process_group("gloo")
    cases = all_pairs(OPTIONS)
    for case in cases:
        run(case)
    check_operands()
    check_micro_batches()
    if RANK == 0:
        print(f"check_fp8_cpu: {len(cases)} cases on {RANKS} ranks: ok", flush=True)
    for cached in (distributed.get_distributed_world_size, distributed.get_distributed_rank):
        cached.cache_clear()  # TransformerEngine keeps the groups that it was asked about
    leave()


if __name__ == "__main__":
    main()

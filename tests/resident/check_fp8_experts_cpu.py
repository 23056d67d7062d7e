"""Grouped experts in FP8 tiles beside TransformerEngine's grouped layers, on a CPU, with stand-ins for its kernels.

python -m tests.resident.check_fp8_experts_cpu FOLDER: see check_transformer_engine_cpu.
"""

import sys
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.resident.check_transformer_engine_cpu import prepare
from tests.support.harness import all_pairs

HIDDEN, FEATURES = 128, 384
ROWS = {
    "uneven": [368, 0, 16, 144],
    "even": [128] * 4,
    "one": [0, 0, 512, 0],
    "none": [0] * 4,
}
OPTIONS = {
    "recipe": ["tensorwise", "blockwise", "delayed"],
    "rows": list(ROWS),
    "tiles": [1, 3, 8],
    "keep": [0, 1, 8],
    "hold": [True, False],
    "quantized_weights": [True, False],
    "gathers": [True, False],
    "fuse": [True, False],
    "bias": [True, False],
    "frozen": ["", "fc1", "fc2"],
}
KINDS = ("hidden", "activation", "pre_grad", "output_grad")


def swiglu(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    assert scale is not None
    gate, up = (pre if bias is None else pre + bias).chunk(2, -1)
    return (F.silu(gate) * up * scale.unsqueeze(-1)).to(pre.dtype)


class Case:
    """Inputs, parameters, and the quantizers of fc1 and fc2."""

    def __init__(self, case: dict[str, Any]) -> None:
        from tests.resident.check_fp8_cpu import quantized_parameter
        from tests.support import fp8_on_cpu

        self.case, self.rows, recipe = case, ROWS[case["rows"]], case["recipe"]
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, factor: float = 1.0) -> Tensor:
            return factor * torch.randn(*shape, dtype=torch.bfloat16, generator=generator)

        count, experts = sum(self.rows), range(len(self.rows))
        self.tokens, self.indices = draw(700, HIDDEN), torch.randperm(700, generator=generator)[:count]
        self.hidden, self.grad = self.tokens[self.indices].requires_grad_(), draw(count, HIDDEN)
        self.scale = torch.rand(count, generator=generator).requires_grad_()
        shapes = {"fc1": (2 * FEATURES, HIDDEN), "fc2": (HIDDEN, FEATURES)}
        self.weights: dict[str, list[Any]] = {}
        self.exact: dict[str, list[Tensor]] = {}
        for name, shape in shapes.items():
            plain = [draw(*shape, factor=0.1) for _ in experts]
            self.exact[name] = [one.double().requires_grad_() for one in plain]
            made = (quantized_parameter(one, recipe) if case["quantized_weights"] else one for one in plain)
            self.weights[name] = [torch.nn.Parameter(one, requires_grad=name != case["frozen"]) for one in made]
            for weight in self.weights[name] if case["fuse"] else ():
                weight.main_grad = torch.zeros(shape)
        self.biases = [draw(2 * FEATURES).requires_grad_() for _ in experts] if case["bias"] else []
        self.quantizers = {kind: [fp8_on_cpu.quantizer(recipe) for _ in experts] for kind in KINDS}
        self.of_weights = {name: [fp8_on_cpu.quantizer(recipe, weight=True) for _ in experts] for name in shapes}

    def results(self, output: Tensor, between: Any = None) -> dict[str, Tensor]:
        output = output + 0  # so that it has a graph
        if between is not None:
            between()
        output.backward(self.grad)
        found = {"output": output.detach(), "hidden": self.hidden.grad, "scale": self.scale.grad}
        for name, weights in self.weights.items():
            assert name != self.case["frozen"] or all(weight.grad is None for weight in weights)
            if name != self.case["frozen"]:
                grads = [weight.main_grad if self.case["fuse"] else weight.grad for weight in weights]
                found[name] = torch.stack([grad.double() for grad in grads])
        if self.biases:
            found["bias"] = torch.stack([bias.grad for bias in self.biases])
        return found

    def tiled(self) -> dict[str, Tensor]:
        from megatron_tiling.resident.fp8_experts import FP8Products
        from megatron_tiling.resident.fp8_operands import WeightCopies, knows_scale
        from megatron_tiling.tiles.activation import Activation
        from megatron_tiling.tiles.expert_groups import cut_by_rows, expert_groups
        from megatron_tiling.tiles.expert_loop import ExpertsLoop
        from megatron_tiling.tiles.experts import Source, tiled_experts

        copies = {name: [WeightCopies(by, self.case["hold"]) for by in of] for name, of in self.of_weights.items()}
        delayed = self.case["recipe"] == "delayed"
        for name in copies if delayed else ():
            for copy, weight in zip(copies[name], self.weights[name], strict=True):
                copy.note(weight)
        groups = cut_by_rows(expert_groups(self.rows, FEATURES, self.case["tiles"], self.case["keep"]), 128)
        recomputes = self.case["gathers"] or any(group.kept < group.count for group in groups)
        saves = not recomputes and self.case["frozen"] != "fc1"
        loop = ExpertsLoop(
            groups=groups,
            features=FEATURES,
            activation=Activation(True, swiglu),
            products=FP8Products(self.quantizers, copies, (False, True, True), False, saves_hidden=saves),
            fuse_wgrad=self.case["fuse"],
        )
        segments = [segment for group in loop.groups for segment in group.segments]
        self.is_cut = len(segments) > sum(count > 0 for count in self.rows)
        source = Source(self.tokens, self.indices) if self.case["gathers"] else None
        operands = self.scale, self.weights["fc1"], self.biases, self.weights["fc2"], loop, source
        output = tiled_experts(self.hidden, *operands)
        forward = [*self.quantizers["hidden"], *self.quantizers["activation"], *self.of_weights["fc1"]]
        forward += self.of_weights["fc2"]
        noted = [by.amax.clone() for by in forward] if delayed else []

        def next_micro_batch() -> None:
            """Its histories begin, with other scales."""
            for by in forward if delayed else ():
                assert knows_scale(by)
                by.amax.zero_()
                by.scale.fill_(2.0)

        found = self.results(output, next_micro_batch)
        if delayed:
            assert all(by.amax == 0 for by in forward), "the backward pass has noted what the forward pass had"
            for by, amax in zip(forward, noted, strict=True):
                by.amax.copy_(amax)
        return found

    def stock(self) -> dict[str, Tensor]:
        """Two of TransformerEngine's grouped linear layers, and the activation."""
        from transformer_engine.pytorch.module.grouped_linear import _GroupedLinear

        none, sizes = [None] * len(self.rows), torch.tensor(self.rows)
        for by in (one for kind in KINDS for one in self.quantizers[kind]):
            by.internal = True
            by.set_usage(rowwise=True, columnwise=True)

        def layer(input_: Tensor, name: str, kinds: tuple[str, str], biases: list[Tensor]) -> Tensor:
            of_input, of_grad = (self.quantizers[kind] for kind in kinds)
            quantizers = of_input, self.of_weights[name], none, none, none, of_grad
            how = bool(biases), None, True, False, None, *quantizers, self.case["fuse"], False, False, torch.bfloat16
            others = True, none, False, None, False, False
            tensors = [*self.weights[name], *(biases or [torch.empty(0) for _ in self.rows])]
            if "dgrad_out" in signature(_GroupedLinear.forward).parameters:  # 2.20: grouped tensors, outputs given
                others, tensors = (*others, False, False, False), [None, None, *tensors]
            output: Tensor = _GroupedLinear.apply(input_, sizes, (*how, *others), *tensors)[0]
            return output

        pre = layer(self.hidden, "fc1", ("hidden", "pre_grad"), self.biases)
        activated = swiglu(pre, None, self.scale)
        return self.results(layer(activated, "fc2", ("activation", "output_grad"), []))

    def float64(self) -> dict[str, Tensor]:
        leaves = [leaf.detach().double().requires_grad_() for leaf in (self.hidden, self.scale)]
        biases = [bias.detach().double().requires_grad_() for bias in self.biases]
        outputs = []
        for expert, (x, scale) in enumerate(zip(*(leaf.split(self.rows) for leaf in leaves), strict=True)):
            fc1, fc2 = (self.exact[name][expert] for name in ("fc1", "fc2"))
            outputs.append(swiglu(x @ fc1.t(), biases[expert] if biases else None, scale) @ fc2.t())
        output = torch.cat(outputs)
        output.backward(self.grad.double())
        found = {"output": output.detach(), "hidden": leaves[0].grad, "scale": leaves[1].grad}
        lists = self.exact | ({"bias": biases} if biases else {})
        return found | {name: torch.stack([one.grad for one in ones]) for name, ones in lists.items()}


def run(case: dict[str, Any]) -> None:
    ours, theirs = Case(case), Case(case)
    found, stock, exact = ours.tiled(), theirs.stock(), theirs.float64()
    assert found.keys() == stock.keys()
    for name, value in stock.items():
        reference = exact[name]
        error, limit = (
            (one.double() - reference).norm() / max(reference.norm(), 1e-30) for one in (found[name], value)
        )
        assert error <= 1.05 * limit + 5e-4, f"{case}: {name}: {error:.4f}, stock's {limit:.4f}"
        assert error < 0.09, f"{case}: {name}: {error:.4f}"
        distance = (found[name].double() - value.double()).norm() / max(value.double().norm(), 1e-30)
        if case["recipe"] != "tensorwise" or not ours.is_cut:  # the same scales
            assert distance < (5e-3 if ours.is_cut else 1e-3), f"{case}: {name}: {distance:.5f} from stock's"
    if case["recipe"] != "delayed":
        return
    every = [(*one.quantizers.values(), *one.of_weights.values()) for one in (ours, theirs)]
    notes = [[by.amax for of in one for by in of] for one in every]
    for index, (amax, other) in enumerate(zip(*notes, strict=True)):
        assert torch.allclose(amax, other, rtol=0.02), f"{case}: {index}: {amax}, stock's {other}"


def check_padded_source() -> None:
    """Padding repeats the last row of an expert."""
    from megatron_tiling.resident.fp8_experts import padded_source
    from megatron_tiling.tiles.experts import Source

    source = Source(torch.empty(9, 1), torch.tensor([7, 3, 5, 8, 0]))
    assert padded_source(source, [2, 0, 3, 0], [4, 0, 4, 0]).indices.tolist() == [7, 3, 3, 3, 5, 8, 0, 0]
    assert padded_source(source, [0, 5], [0, 5]).indices.equal(source.indices)


def experts_of(recipe: str, **changes: Any) -> Any:
    from tests.resident.check_transformer_engine_cpu import build
    from tests.support.te_models import EXPERTS

    settings = {"fp8": "e4m3", "fp8_recipe": recipe, "bf16": True, "params_dtype": torch.bfloat16, "num_layers": 1}
    settings |= {"hidden_size": HIDDEN, "ffn_hidden_size": FEATURES, "moe_ffn_hidden_size": FEATURES}
    settings |= {"moe_grouped_gemm": True, "moe_shared_expert_intermediate_size": None}
    experts = build(**EXPERTS | settings | changes).decoder.layers[0].mlp.experts
    for layer in (experts.linear_fc1, experts.linear_fc2):
        layer.fuse_wgrad_accumulation = True
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad = False
    return experts


def train(experts: Any, recipe: Any, rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Micro-batches, two an optimizer step: outputs, gradients of inputs and of parameters; histories and scales."""
    from transformer_engine.pytorch import autocast
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    results, generator = [], torch.Generator().manual_seed(4)
    for number, of_experts in enumerate(rows):
        if number % 2 == 0:
            for layer in (experts.linear_fc1, experts.linear_fc2):
                layer.is_first_microbatch = True
            for parameter in experts.parameters():
                parameter.main_grad.zero_()
                parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        hidden, grad = (torch.randn(sum(of_experts), HIDDEN, generator=generator).bfloat16() for _ in range(2))
        scale = torch.rand(sum(of_experts), generator=generator).requires_grad_()
        hidden.requires_grad_()
        with autocast(enabled=True, recipe=recipe):
            output, _ = experts(hidden, torch.tensor(of_experts), scale)
        output.backward(grad)
        results += [output.detach(), hidden.grad, scale.grad]
        results += [parameter.main_grad.clone() for parameter in experts.parameters()]
    metas = [layer.fp8_meta for layer in (experts.linear_fc1, experts.linear_fc2)]
    states = [meta[key] for meta in metas for key in ("scaling_fwd", "scaling_bwd") if recipe.delayed()]
    return results, [tensor.clone() for state in states for tensor in (state.amax_history, state.scale)]


def check_modules(recipes: dict[str, Any]) -> None:
    """Megatron's experts, stock and tiled: padding, first micro-batches, histories, what checkpoints have."""
    from transformer_engine.common.recipe import Format

    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import table
    from megatron_tiling.resident import fp8
    from megatron_tiling.resident.fp8_experts import TiledFP8GroupedMLP

    fp8.is_non_tn_fp8_gemm_supported = lambda: False  # there is no GPU to ask
    rows = [[100, 0, 3, 60], [0, 50, 0, 0], [17, 16, 15, 14], [0] * 4]
    for (name, kind), keep in zip(recipes.items(), (0, 1, 2), strict=True):
        recipe = kind(fp8_format=Format.E4M3)
        if name == "delayed":
            recipe = kind(fp8_format=Format.E4M3, amax_history_len=3, amax_compute_algo="max")
        padded_before = {"moe_router_padding_for_quantization": True, "moe_token_dispatcher_type": "alltoall"}
        for options in ({}, padded_before):
            dense, tiled = experts_of(name, **options), experts_of(name, **options)
            parent = torch.nn.ModuleDict({"experts": tiled})
            reports = tile(parent, TilingConfig(splits={"experts": (1, 2)}, mlp_keep=keep))
            assert type(tiled) is TiledFP8GroupedMLP and "TiledExperts in FP8, at most 2 tiles" in table(reports)
            assert list(tiled.state_dict()) == list(dense.state_dict())
            aligned = [[-(-count // 16) * 16 for count in one] for one in rows] if options else rows
            (found, notes), (expected, others) = (train(one, recipe, aligned) for one in (tiled, dense))
            assert set(tiled._copies) == {"linear_fc1", "linear_fc2"}  # the loop has run
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                distance = (one.double() - other.double()).norm() / max(other.double().norm(), 1e-30)
                assert distance < (0.05 if name == "tensorwise" else 5e-3), f"{name}: {index}: {distance:.4f}"
            for index, (one, other) in enumerate(zip(notes, others, strict=True)):
                assert other.any() and torch.allclose(one, other, rtol=0.02), f"{name}: {index}: {one}, {other}"


def main() -> None:
    prepare(Path(sys.argv[1]))
    from megatron.core import parallel_state
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.module import grouped_linear
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_tiling.resident import experts, fp8_loop
    from tests.support import fp8_on_cpu

    fp8_on_cpu.install(fp8_loop)
    fp8_on_cpu.install_for_modules(grouped_linear, experts)
    known = {"tensorwise": recipes.Float8CurrentScaling, "blockwise": recipes.Float8BlockScaling}
    known["delayed"] = recipes.DelayedScaling
    cases = all_pairs(OPTIONS)
    for case in cases:
        FP8GlobalStateManager.quantization_state.fp8_recipe = known[case["recipe"]]()
        run(case)
    check_padded_source()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    check_modules(known)
    torch.distributed.destroy_process_group()
    print(f"check_fp8_experts_cpu: {len(cases)} cases: ok", flush=True)


if __name__ == "__main__":
    main()

"""FP8 in tiles: one SwiGLU MLP of TransformerEngine's layers, forward and backward, on one Hopper GPU.

    python -m benchmarks.mlp_fp8 [--sizes 4096x14336 8192x28672] [--tokens 8192] [--repeats 15] [--results DIR]

Writes ``<date>-mlp-fp8.md``: time and memory of dense and tiled FP8 in each recipe, beside bf16, with float32
``main_grad`` held. A first micro-batch of an optimizer step quantizes the weights; a later one takes what the first has
kept. Memory is the peak of both, with copies of weights as they are held. Every size has a process of its own.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.each_size import measured
from benchmarks.record import Origin

PACKAGES = ("torch", "triton", "megatron-core", "transformer_engine")
RECIPES = ("tensorwise", "blockwise", "delayed")
#: Tiles, kept ones (None: all), whether copies of weights are held.
TILED: list[tuple[int, int | None, bool]] = [
    *[(2, None, False), (2, None, True), (3, None, False), (4, None, False), (4, None, True), (8, None, False)],
    *[(4, 0, False), (8, 0, False), (8, 0, True)],
]
HEAD_START = 60_000_000  # GPU cycles: many small tiles take the host longer than the GPU, which is told apart
PROFILED = ("dense", "T=4 keep all", "T=8 keep none")


@dataclass
class Run:
    """One MLP, and what was measured of it: milliseconds of first and later micro-batches and of the host, MiB."""

    recipe: str
    name: str
    mlp: Any
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    memory_mib: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, int, float]] = field(default_factory=list)

    def step(self, is_first: bool) -> Callable[[Any], Any]:
        from megatron.core.fp8_utils import get_fp8_context

        def run(hidden: Any) -> Any:
            for layer in self.mlp.children():
                layer.is_first_microbatch = is_first
                if is_first and hasattr(layer.weight, "update_usage"):  # an optimizer step leaves no columns
                    layer.weight.update_usage(rowwise_usage=True, columnwise_usage=False)
            with get_fp8_context(self.mlp.config, 0):
                return self.mlp(hidden)[0]

        return run

    def forget(self) -> None:
        """The copies of weights."""
        getattr(self.mlp, "_copies", {}).clear()
        for layer in self.mlp.children():
            getattr(layer, "_fp8_workspaces", {}).clear()  # a tiled layer in bf16 has none
            if hasattr(layer.weight, "update_usage"):
                layer.weight.update_usage(rowwise_usage=True, columnwise_usage=False)


def mlp_of(hidden_size: int, ffn_hidden_size: int, **options: Any) -> Any:
    import torch
    import torch.nn.functional as F
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, num_attention_heads=32,
        params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, bias_activation_fusion=True, gradient_accumulation_fusion=True, **options,
    )  # fmt: skip
    layers = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    with get_fp8_context(config, 0, is_init=True):
        return MLP(config, layers, ffn_hidden_size=ffn_hidden_size)


def runs_of(hidden_size: int, ffn_hidden_size: int) -> list[Run]:
    """All of them on the same weights and gradients; those with FP8 parameters on their own."""
    import torch

    from megatron_tiling import TilingConfig, tile

    runs: list[Run] = []
    weights: dict[str, Any] = {}

    def add(
        recipe: str, name: str, tiles: int = 0, keep: int | None = None, hold: bool = False, **options: Any
    ) -> None:
        mlp = mlp_of(hidden_size, ffn_hidden_size, **options)
        for layer in ("linear_fc1", "linear_fc2"):
            weight = getattr(mlp, layer).weight
            if not options.get("fp8_param"):
                weight = getattr(mlp, layer).weight = weights.setdefault(layer, weight)
            if not hasattr(weight, "main_grad"):
                held = weights.setdefault(f"{layer} gradient", torch.zeros(weight.shape, device="cuda"))
                weight.main_grad = held
        if tiles:
            reports = tile(
                torch.nn.ModuleDict({"mlp": mlp}), TilingConfig(tiles, mlp_keep="all" if keep is None else 0)
            )
            assert all(report.mlp for report in reports), reports
            mlp.holds_weights = hold
        runs.append(Run(recipe, name, mlp))

    add("bf16", "dense")
    add("bf16", "T=4 keep all", 4)
    add("bf16", "T=8 keep none", 8, 0)
    for recipe in RECIPES:
        options = {"fp8": "hybrid", "fp8_recipe": recipe}
        add(recipe, "dense", **options)
        for tiles, keep, hold in TILED:
            add(recipe, name_of(tiles, keep, hold), tiles, keep, hold, **options)
        add(recipe, "dense, FP8 parameters", fp8_param=True, **options)
        for tiles, keep in ((4, None), (8, 0)):
            add(recipe, f"{name_of(tiles, keep)}, FP8 parameters", tiles, keep, fp8_param=True, **options)
    return runs


def name_of(tiles: int, keep: int | None, hold: bool = False) -> str:
    return f"T={tiles} keep {'all' if keep is None else 'none'}" + ", copies held" * hold


def run_size(hidden_size: int, ffn_hidden_size: int, tokens: int, repeats: int) -> dict[str, Any]:
    """All runs at one size, in this process."""
    import torch

    from benchmarks import mlp_measure as measure
    from benchmarks.mlp_candidates import Candidate, initialize

    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.manual_seed(0)
    initialize()
    hidden = torch.randn(tokens, 1, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(hidden)
    runs = runs_of(hidden_size, ffn_hidden_size)

    def candidate(run: Run, is_first: bool) -> Candidate:
        return Candidate(run.name, run.step(is_first), list(run.mlp.parameters()))

    for run in runs:
        for _ in range(3):  # compiles, and fills the history of delayed scaling
            measure.step(candidate(run, True), hidden, grad_output)
        run.forget()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for is_first in (True, False):
            measure.step(candidate(run, is_first), hidden, grad_output)
        torch.cuda.synchronize()
        run.memory_mib = (torch.cuda.max_memory_allocated() - before) / measure.MIB
        run.forget()
    order = list(runs)
    for _ in range(repeats):
        random.shuffle(order)
        for run in order:
            run.first.append(measure.time_once(candidate(run, True), hidden, grad_output, HEAD_START))
            began = time.perf_counter()
            torch.cuda._sleep(HEAD_START)
            measure.step(candidate(run, False), hidden, grad_output)
            run.host.append(1000 * (time.perf_counter() - began))
            run.later.append(measure.time_once(candidate(run, False), hidden, grad_output, HEAD_START))
            run.forget()
    for run in runs:
        if run.name in PROFILED:
            run.kernels = measure.kernel_table(candidate(run, False), hidden, grad_output)
            run.forget()
    expected = measure.reference(
        hidden.flatten(0, 1), runs[0].mlp.linear_fc1.weight, runs[0].mlp.linear_fc2.weight, grad_output.flatten(0, 1)
    )
    for run in runs:
        if "parameters" not in run.name:
            for layer in run.mlp.children():
                layer.weight.main_grad.zero_()
            output = measure.step(candidate(run, True), hidden, grad_output)
            grads = {"output": output.flatten(0, 1).detach(), "hidden": hidden.grad.flatten(0, 1)}
            run.errors = errors_of(run, grads, expected)
            run.forget()
    torch.distributed.destroy_process_group()
    kept = ("recipe", "name", "first", "later", "host", "memory_mib", "errors", "kernels")
    return {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "tokens": tokens,
        "gpu": torch.cuda.get_device_name(),
        "runs": [{name: getattr(run, name) for name in kept} for run in runs],
    }


def errors_of(run: Run, grads: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative RMS errors of an output and the gradients."""
    found = grads | {"fc1": run.mlp.linear_fc1.weight.main_grad, "fc2": run.mlp.linear_fc2.weight.main_grad}
    return {name: float((found[name].double() - exact).norm() / exact.norm()) for name, exact in expected.items()}


def page(runs: list[dict[str, Any]], origin: Origin) -> str:
    lines = origin.head("FP8 in tiles, one SwiGLU MLP", f"{runs[0]['tokens']} tokens")
    lines += [
        "Forward and backward, `main_grad` (float32) held. Milliseconds are medians, in the first micro-batch of an",
        "optimizer step, whose weights are quantized, and in later ones. MiB are the peak of both beyond weights,",
        "input, upstream gradient and `main_grad`, with copies of weights as they are held. Ratios are to dense FP8 of",
        "the same recipe. Host is the time in which the CPU launches a later step, for which times do not wait.",
        "Error is the largest ratio of an RMS error against float64 to dense's, of output and gradients.",
        "",
    ]
    for size in runs:
        lines += [f"## h={size['hidden_size']}, ffn={size['ffn_hidden_size']}", ""]
        lines += ["| recipe | run | first, ms | ratio | later, ms | ratio | host, ms | MiB | ratio | error |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        dense = {run["recipe"]: run for run in size["runs"] if run["name"] == "dense"}
        for run in size["runs"]:
            base = dense[run["recipe"]]
            cells = [run["recipe"], run["name"]]
            for key in ("first", "later"):
                cells += [f"{median(run[key]):.2f}", f"{median(run[key]) / median(base[key]):.3f}"]
            cells += [
                f"{median(run['host']):.1f}",
                f"{run['memory_mib']:.0f}",
                f"{run['memory_mib'] / base['memory_mib']:.2f}",
            ]
            ratios = [error / base["errors"][name] for name, error in run["errors"].items()]
            cells.append(f"{max(ratios):.3f}" if ratios else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        for run in size["runs"]:
            if run["kernels"]:
                lines += [f"### Kernels of one later step, {run['recipe']}, {run['name']}", ""]
                lines += ["| kernel | calls | ms |", "|---|---|---|"]
                lines += [f"| `{name[:90]}` | {calls} | {ms:.3f} |" for name, calls, ms in run["kernels"][:14]]
                lines.append("")
    return "\n".join(lines)


def main() -> None:
    args, origin, runs = measured(__doc__, PACKAGES, 15, run_size)
    path = args.results / f"{origin.date}-mlp-fp8.md"
    path.write_text(page(runs, origin))
    print(path.read_text())


if __name__ == "__main__":
    main()

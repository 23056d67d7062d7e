"""Experts in grouped GEMMs, TransformerEngine's and tiled: time, what is kept between the passes, and the peak.

    python -m benchmarks.experts [--cases 8:2:1536 8:8:14336 64:8:768] [--tokens 8192] [--repeats 20] [--combine]
        [--sonic-untuned]
        [--results DIR]

A case is local experts, experts a token goes to, and ffn of an expert. What runs is Megatron's permutation (fused) of
tokens that are all local, and the experts. Tokens, output, weights and float32 gradients (``main_grad``), to which all
candidates add within their GEMMs, are not counted. Every case has a process of its own, candidates run interleaved in
random order. With ``--combine`` the tokens' combination by Megatron is timed too, for SonicMoE's kernels do it.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import experts_sonic
from benchmarks.arguments import output_folder, positive
from benchmarks.record import RESULTS, Origin, kernel_lines, machine

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "sonic-moe", "quack-kernels")
CASES = ("8:2:1536", "8:8:1536", "8:2:14336", "8:8:14336", "64:8:768")
STOCK = "TransformerEngine"
#: Tiles, and how many keep their pre-activations.
OURS: tuple[tuple[int, int | str], ...] = ((1, "all"), (2, "all"), (4, "all"), (4, 2), (4, 0), (8, 0))
ONCE = ", tokens kept once"
HEAD_START = 40_000_000  # GPU cycles: the host launches the many products of a step in the meantime
MIB = 2**20
COMBINED = (
    "",
    "The combination of tokens is in all times. SonicMoE works on a copy of the weights; its weights' gradients are "
    "bf16 tensors, part of its peak, which are then added to main_grad.",
)


def build(hidden_size: int, experts: int, ffn_hidden_size: int) -> Any:
    """Megatron's experts on TransformerEngine's grouped layers."""
    import torch
    import torch.nn.functional as F
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, num_attention_heads=hidden_size // 128,
        num_moe_experts=experts, moe_ffn_hidden_size=ffn_hidden_size, moe_grouped_gemm=True,
        params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu,
        bias_activation_fusion=True, gradient_accumulation_fusion=True,
    )  # fmt: skip
    submodules = GroupedMLPSubmodules(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    module = TEGroupedMLP(experts, config, submodules, pg_collection=groups)
    return torch.nn.ModuleDict({"experts": module}).cuda()


def routing(tokens: int, experts: int, top_k: int) -> Any:
    """``[tokens, experts]``: a token goes to the ``top_k`` best of random scores, and some experts have better ones."""
    import torch

    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(tokens, experts, generator=generator) + 0.25 * torch.randn(experts, generator=generator)
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, True)


class LocalTokens:
    """Stands for the dispatcher of a MoE layer whose tokens are all local."""

    def __init__(self, tokens: Any, routing_map: Any) -> None:
        self.tokens, self.indices = tokens, routing_map.t().nonzero()[:, 1].contiguous()

    def source_of(self, permuted: Any) -> Any:
        from megatron_tiling.tiles.experts import Source

        return Source(self.tokens, self.indices)


def candidates(
    case: tuple[int, ...], tokens: Any, routing_map: Any, probs: Any, combine: bool, untuned: bool
) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """On the same weights: stock, recomputed by Megatron, and tiled."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    from benchmarks.gpt import share
    from megatron_tiling import TilingConfig, tile

    counts = routing_map.sum(0).cpu()
    dense = build(*case)
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def run(experts: Any) -> Callable[[Any], Any]:
        def permuted_through(hidden: Any) -> Any:
            rows, _, order, *_ = permute(hidden, routing_map, num_out_tokens=len(probs), fused=hidden.is_cuda)
            output = experts(rows, counts, probs)[0]
            return unpermute(output, order, hidden.shape, fused=hidden.is_cuda) if combine else output

        return permuted_through

    yield STOCK, run(dense.experts)
    recomputed = build(*case)
    share(recomputed, dict(dense.named_parameters()))
    recomputed.experts.activation_recompute = True
    yield f"{STOCK}, recompute moe_act", run(recomputed.experts)
    stock = run(dense.experts)
    yield f"{STOCK}, recompute moe", lambda hidden: tensor_parallel.checkpoint(stock, False, hidden)
    default = build(*case)
    share(default, dict(dense.named_parameters()))
    tile(default, TilingConfig())
    yield "ours: default", run(default.experts)
    for tiles, keep in OURS:
        model = build(*case)
        share(model, dict(dense.named_parameters()))
        tile(model, TilingConfig(splits={"experts": (1, tiles)}, mlp_keep=keep))  # type: ignore[arg-type]
        yield f"ours: T={tiles} keep {keep}", run(model.experts)
        if keep == 0:
            once = build(*case)
            share(once, dict(dense.named_parameters()))
            tile(once, TilingConfig(splits={"experts": (1, tiles)}, mlp_keep=0))
            once.experts._dispatcher = LocalTokens(tokens, routing_map)
            yield f"ours: T={tiles} keep {keep}{ONCE}", run(once.experts)
    if combine and experts_sonic.to_be_had():
        sonic = experts_sonic.run_of(dense.experts, routing_map, probs)
        yield experts_sonic.NAME + ", not tuned" * untuned, sonic


def memory(run: Callable[[Any], Any], hidden: Any, grad_output: Any) -> tuple[float, float]:
    """MiB kept between the passes, and at the peak, beside input, output, gradient of the output, and weights'."""
    import torch

    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run(hidden)
    kept = torch.cuda.memory_allocated() - before - output.nbytes
    output.backward(grad_output)
    torch.cuda.synchronize()
    return kept / MIB, (torch.cuda.max_memory_allocated() - before - output.nbytes) / MIB


def run_case(case: str, hidden_size: int, tokens: int, repeats: int, combine: bool, untuned: bool) -> dict[str, Any]:
    import torch

    from benchmarks import gpt
    from benchmarks import mlp_measure as measure
    from benchmarks.mlp_candidates import Candidate

    gpt.initialize()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch._dynamo.config.automatic_dynamic_shapes = False
    model_parallel_cuda_manual_seed(7)
    experts, top_k, ffn = map(int, case.split(":"))
    routing_map = routing(tokens, experts, top_k).cuda()
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(tokens * top_k, device="cuda", requires_grad=True)
    grad_output = torch.randn(tokens if combine else tokens * top_k, hidden_size, device="cuda", dtype=torch.bfloat16)
    rows = torch.empty(tokens * top_k, hidden_size, device="meta", dtype=torch.bfloat16)
    found: dict[str, dict[str, Any]] = {}
    chosen = []
    exact: list[Any] = []
    for name, run in candidates((hidden_size, experts, ffn), hidden, routing_map, probs, combine, untuned):
        candidate = Candidate(name, run, [probs])
        output = measure.step(candidate, hidden, grad_output)
        values = [output.detach().clone(), hidden.grad.clone(), probs.grad.clone()]
        exact = exact or values
        differences = [float((one - other).norm() / other.norm()) for one, other in zip(values, exact, strict=True)]
        for _ in range(3):
            measure.step(candidate, hidden, grad_output)
        del output, values
        kept, peak = memory(run, hidden, grad_output)
        without_rows = ONCE in name or name.endswith("recompute moe") or name.startswith(experts_sonic.NAME)
        rows_mib = 0.0 if without_rows else rows.nbytes / MIB
        found[name] = {"name": name, "kept_mib": kept, "rows_mib": rows_mib, "peak_mib": peak}
        found[name]["difference"] = max(differences)
        found[name]["milliseconds"] = []
        chosen.append(candidate)
    for _ in range(repeats):
        for candidate in random.sample(chosen, len(chosen)):
            once = measure.time_once(candidate, hidden, grad_output, HEAD_START)
            found[candidate.name]["milliseconds"].append(once)
    for candidate in chosen:
        found[candidate.name]["kernels"] = measure.kernel_table(candidate, hidden, grad_output)
    torch.distributed.destroy_process_group()
    return {"case": case, "rows": routing_map.sum(0).tolist(), "gpu": machine(), "candidates": list(found.values())}


def markdown(record: dict[str, Any]) -> str:
    lines = [
        *Origin(**record["origin"]).head("Experts in grouped GEMMs", "main_grad held"),
        f"{record['tokens']} tokens, h={record['hidden_size']}, SwiGLU, bf16, random data, medians of "
        f"{record['repeats']} interleaved runs. Kept between the passes, beside tokens and output: the permuted rows, "
        "and what else, which is compared. The peak is that of all that a step allocates. Difference: the largest "
        "relative RMS from stock of output and of the gradients of tokens and probabilities.",
        *COMBINED * record["combine"],
    ]
    for run in record["runs"]:
        experts, top_k, ffn = run["case"].split(":")
        stock = run["candidates"][0]
        base = statistics.median(stock["milliseconds"])
        spread = f"{min(run['rows'])} to {max(run['rows'])}"
        lines += ["", f"## {experts} local experts, top-{top_k}, ffn={ffn}; {spread} rows an expert", ""]
        lines += ["| | ms | time | rows MiB | else MiB | else | peak MiB | peak | difference |", "|---" * 9 + "|"]
        base_kept = stock["kept_mib"] - stock["rows_mib"]
        for row in run["candidates"]:
            median, kept = statistics.median(row["milliseconds"]), row["kept_mib"] - row["rows_mib"]
            lines.append(
                f"| {row['name']} | {median:.2f} | {median / base:.3f} | {row['rows_mib']:.0f} | {kept:.0f} | "
                f"{kept / base_kept:.3f} | {row['peak_mib']:.0f} | "
                f"{row['peak_mib'] / stock['peak_mib']:.3f} | {row['difference']:.1e} |"
            )
        for row in run["candidates"]:
            if row["name"] in (STOCK, "ours: T=4 keep all"):
                lines += kernel_lines(f"Kernels of {row['name']}", row["kernels"][:12])
    return "\n".join(lines) + "\n"


def write(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    origin = Origin.now(PACKAGES, runs[0]["gpu"])
    record = {"origin": asdict(origin), "hidden_size": args.hidden_size, "tokens": args.tokens}
    record |= {"repeats": args.repeats, "combine": args.combine, "runs": runs}
    path = args.results / f"{origin.date}-experts{'-combined' * args.combine}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    page = markdown(record)
    path.with_suffix(".md").write_text(page)
    print(page, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="local experts:top-k:ffn")
    parser.add_argument("--hidden-size", type=positive, default=4096)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--combine", action="store_true", help="the combination of tokens too, beside SonicMoE's")
    parser.add_argument("--sonic-untuned", action="store_true", help="SonicMoE without its tuner, which takes minutes")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--one-case-into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_case_into:
        if args.sonic_untuned:
            experts_sonic.leave_untuned()
        found = run_case(args.cases[0], args.hidden_size, args.tokens, args.repeats, args.combine, args.sonic_untuned)
        args.one_case_into.write_text(json.dumps(found))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(args.cases):
            path = Path(folder) / str(number)
            command = [sys.executable, "-m", "benchmarks.experts", "--cases", case, "--tokens", str(args.tokens)]
            command += ["--hidden-size", str(args.hidden_size), "--repeats", str(args.repeats)]
            command += ["--combine"] * args.combine + ["--sonic-untuned"] * args.sonic_untuned
            subprocess.run([*command, "--one-case-into", str(path)], check=True)
            runs.append(json.loads(path.read_text()))
            write(args, runs)  # a run that is stopped leaves those that are done


if __name__ == "__main__":
    main()

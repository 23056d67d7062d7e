"""The LM head with its loss, forward and backward: Megatron's ways, Liger's, Apple's, and this package's.

    python -m benchmarks.lm_head [--tokens 8192 --hidden-size 4096 --vocabulary 128256]
    torchrun --standalone --nproc-per-node TP -m benchmarks.lm_head [--sequence-parallel]

All candidates share one weight and its float32 ``main_grad``, take the hidden states ``[s, 1, h]`` and return a loss
per token. Times are medians of interleaved runs in random order, errors relative to float64. Writes a dated Markdown
table into benchmarks/results/; peers that are not installed are left out, and named. Under torchrun the vocabulary is
divided among the processes, Megatron and ours are compared, and collectives are counted.
"""

import argparse
import collections
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arguments import output_folder, positive
from benchmarks.lm_head_candidates import (
    FUSED,
    LIMIT,
    initialize,
    of_cut_cross_entropy,
    of_four_gemms,
    of_liger,
    of_megatron,
    of_ours,
    of_transformer_engine,
    output_layer,
)
from benchmarks.mlp_candidates import Candidate
from benchmarks.mlp_measure import Measurement, measure_held, step
from benchmarks.record import RESULTS, Origin, machine
from megatron_tiling.config import DEFAULT_HEAD_MEMORY_MIB
from megatron_tiling.tiles.head_cut import HeadTiles

OURS = f"ours, {DEFAULT_HEAD_MEMORY_MIB} MiB"
PACKAGES = ("torch", "triton", "megatron-core", "transformer_engine", "liger-kernel", "cut-cross-entropy")
GEMM_KERNELS = ("nvjet", "gemm", "cutlass", "xmma")


def float64_reference(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Losses and gradients of all tokens, and of this process's weight; 1024 tokens at a time."""
    wide, exact = weight.double(), {"loss": [], "hidden": []}
    weight_grad = torch.zeros_like(wide)
    local_labels = labels - dist.get_rank() * len(weight)
    for x, label, grad in zip(*(t.flatten(0, 1).split(1024) for t in (hidden, local_labels, upstream)), strict=True):
        here = ((label >= 0) & (label < len(weight)))[:, None]
        column = label[:, None].where(here, 0)
        logits = x.double() @ wide.t()
        sum_exp, label_logit = logits.exp().sum(dim=-1), (logits.gather(1, column) * here).squeeze(1)
        dist.all_reduce(sum_exp)  # the logits of random data are small
        dist.all_reduce(label_logit)
        exact["loss"].append(sum_exp.log() - label_logit)
        logits.sub_(sum_exp.log()[:, None]).exp_().scatter_add_(1, column, -here.double())
        logits.mul_(grad.double()[:, None])
        hidden_grad = logits @ wide
        dist.all_reduce(hidden_grad)
        exact["hidden"].append(hidden_grad)
        weight_grad.addmm_(logits.t(), x.double())
    return {name: torch.cat(parts) for name, parts in exact.items()} | {"weight": weight_grad}


def errors(candidate: Candidate, hidden: Tensor, upstream: Tensor, expected: dict[str, Tensor]) -> dict[str, float]:
    """RMS of the difference to float64, over the RMS of the expected values."""
    (weight,) = candidate.parameters
    weight.main_grad.zero_()
    losses = step(candidate, hidden, upstream).detach()
    found = {"loss": losses, "hidden": hidden.grad, "weight": weight.main_grad}
    if losses.stride() == (0, 0):  # a mean loss, spread
        expected = expected | {"loss": expected["loss"].mean().expand(losses.numel())}
    return {
        name: float((found[name].reshape(exact.shape) - exact).norm() / exact.norm())
        for name, exact in expected.items()
    }


class Collectives(TorchDispatchMode):
    """Counts them by name, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def collectives(candidate: Candidate, hidden: Tensor, upstream: Tensor) -> str:
    with Collectives() as counter:
        step(candidate, hidden, upstream)
    return ", ".join(f"{count} {name.strip('_')}" for name, count in sorted(counter.counts.items()) if count)


def report(
    results: list[Measurement],
    missing: dict[str, str],
    counts: dict[str, str],
    origin: Origin,
    args: argparse.Namespace,
) -> str:
    by_name = {result.name: result for result in results}
    fused = by_name[FUSED]
    lines = [
        *origin.head("LM head and loss, forward + backward", f"TP={dist.get_world_size()}"),
        f"{args.tokens} tokens, h={args.hidden_size}, vocabulary {args.vocabulary}, bf16, random data; medians of "
        f"{args.repeats} interleaved runs. The float32 main_grad is held all the time and added to: by Megatron's and "
        "our wgrad GEMMs, for others by a hook. Memory: the peak beyond it, weight, input and upstream gradient. "
        "Errors: relative RMS against float64, of losses (Liger's and Apple's: of their mean) and of the gradients "
        "of input and weight.", "",
        "| | ms | time | MiB | error: loss, dx, dW |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        error = ", ".join(f"{value:.2e}" for value in result.errors.values())
        memory = "" if result.name == LIMIT else f"{result.memory_with_main_grad_mib:.0f}"
        ratio = result.median / fused.median
        lines.append(f"| {result.name} | {result.median:.2f} | {ratio:.3f} | {memory} | {error} |")
    lines += ["", *(f"Left out: {name} ({reason})." for name, reason in missing.items())]
    if dist.get_world_size() > 1:
        lines += [
            "| collectives of a step | |",
            "|---|---|",
            *(f"| {name} | {count} |" for name, count in counts.items()),
        ]
    if LIMIT in by_name and OURS in by_name:
        ours, limit = by_name[OURS], by_name[LIMIT]
        gemms, limit_gemms = gemm_time(ours), gemm_time(limit)
        others = sum(time for _, _, time in ours.kernels) - gemms
        lines += [
            f"Above four whole GEMMs: {ours.median - limit.median:.2f} ms, of which by the profiles below "
            f"{gemms - limit_gemms:.2f} ms because tiles are GEMMs of their own, {others:.2f} ms in other kernels."
        ]
    for result in results:
        if result.kernels:
            total = sum(time for _, _, time in result.kernels)
            lines += ["", f"Kernels of one step, {result.name}: {total:.2f} ms, {gemm_time(result):.2f} in GEMMs", ""]
            lines += ["| kernel | calls | ms |", "|---|---|---|"]
            lines += [f"| `{name[:100]}` | {calls} | {time:.3f} |" for name, calls, time in result.kernels[:14]]
    return "\n".join(lines) + "\n"


def gemm_time(result: Measurement) -> float:
    return sum(time for name, _, time in result.kernels if any(part in name.lower() for part in GEMM_KERNELS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--hidden-size", type=positive, default=4096)
    parser.add_argument("--vocabulary", type=positive, default=128256)
    bounds = sorted({160, 272, 320, 650, 1024, DEFAULT_HEAD_MEMORY_MIB})
    parser.add_argument("--memory-mib", type=positive, nargs="+", default=bounds)
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    tensor_parallel_size = initialize()
    dense = output_layer(args.hidden_size, args.vocabulary, args.sequence_parallel)
    whole = torch.randn(args.tokens, 1, args.hidden_size, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, args.vocabulary, (args.tokens, 1), device="cuda")
    upstream = torch.full((args.tokens, 1), 1 / args.tokens, device="cuda")
    expected = float64_reference(whole, dense.weight.detach(), labels, upstream)
    expected = {name: exact.cpu() for name, exact in expected.items()}
    hidden = whole
    if args.sequence_parallel:
        hidden, shard = (t.chunk(tensor_parallel_size)[dist.get_rank()] for t in (whole, expected["hidden"]))
        expected["hidden"] = shard
    hidden = hidden.clone().requires_grad_()

    candidates, missing = of_megatron(dense, labels), {}
    for peers in (of_transformer_engine, *((of_liger, of_cut_cross_entropy) if tensor_parallel_size == 1 else ())):
        try:
            candidates += peers(dense, labels)
        except ImportError as error:
            missing[peers.__name__.removeprefix("of_")] = str(error)
    bounds = {f"ours, {bound} MiB": HeadTiles(bound) for bound in args.memory_mib}
    candidates += of_ours(dense, labels, bounds | {f"{OURS}, keep 0": HeadTiles(keep=0)})
    if tensor_parallel_size == 1:
        candidates.append(of_four_gemms(dense))
    results = measure_held(candidates, hidden, upstream, args.repeats, {FUSED, OURS, LIMIT})
    counts = {candidate.name: collectives(candidate, hidden, upstream) for candidate in candidates}
    expected = {name: exact.cuda() for name, exact in expected.items()}
    for candidate, result in zip(candidates, results, strict=True):
        if candidate.name != LIMIT:
            result.errors = errors(candidate, hidden, upstream, expected)
    origin = Origin.now(PACKAGES, machine())
    text = report(results, missing, counts, origin, args)
    if dist.get_rank() == 0:
        kind = f"-tp{tensor_parallel_size}{'-sp' * args.sequence_parallel}" if tensor_parallel_size > 1 else ""
        (args.results / f"{origin.date}-lm-head{kind}.md").write_text(text)
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The LM head with its loss, forward and backward: Megatron's ways, Liger's, Apple's, and this package's.

    python benchmarks/lm_head.py [--tokens 8192 --hidden-size 4096 --vocabulary 128256]

All candidates share one weight, take the hidden states ``[s, 1, h]`` and return a loss per token. Times are medians
of interleaved runs in random order, errors relative to float64. Writes a dated Markdown table into
benchmarks/results/; peers that are not installed are left out, and named.
"""

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from candidates import Candidate, initialize
from measure import Measurement, measure, step
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tiling.head_tiles import DEFAULT_MEMORY_MIB, HeadTiles
from megatron_tiling.lm_head import TiledOutputLayer

RESULTS = Path(__file__).parent / "results"
DENSE, OURS, LIMIT = "dense Megatron-core", f"ours, {DEFAULT_MEMORY_MIB} MiB", "four GEMMs, nothing else"
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy")
GEMM_KERNELS = ("nvjet", "gemm", "cutlass", "xmma")


def output_layer(hidden_size: int, vocabulary: int) -> ColumnParallelLinear:
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, num_attention_heads=32, params_dtype=torch.bfloat16, bf16=True,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    return ColumnParallelLinear(
        hidden_size, vocabulary, config=config, init_method=config.init_method, bias=False, gather_output=False
    )


def of_megatron(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    def losses(hidden: Tensor, labels: Tensor = labels) -> Tensor:
        return vocab_parallel_cross_entropy(dense(hidden)[0], labels, tp_group=dense.tp_group)

    def fused(hidden: Tensor) -> Tensor:
        return fused_vocab_parallel_cross_entropy(dense(hidden)[0], labels, dense.tp_group)

    def chunks(hidden: Tensor) -> Tensor:
        parts = zip(hidden.chunk(16), labels.chunk(16), strict=True)
        return torch.cat([tensor_parallel.checkpoint(losses, False, *part) for part in parts])

    named = {DENSE: losses, "Megatron-core, fused loss": fused, "Megatron-core, 16 token chunks, checkpoint": chunks}
    return [Candidate(name, run, [dense.weight]) for name, run in named.items()]


def of_ours(dense: ColumnParallelLinear, labels: Tensor, bounds: list[int]) -> list[Candidate]:
    candidates = []
    for bound in bounds:
        head = output_layer(dense.input_size, dense.output_size)
        head.weight = dense.weight
        head.__class__ = TiledOutputLayer
        head.set_tiles(1, 1)
        head.head_tiles, head.keep_largest = HeadTiles(bound), False
        run = lambda hidden, head=head: head(hidden)[0].cross_entropy(labels)
        candidates.append(Candidate(f"ours, {bound} MiB", run, [dense.weight], (head,)))
    return candidates


def of_liger(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    run = lambda hidden: loss(dense.weight, hidden.flatten(0, 1), labels.flatten())
    return [Candidate("Liger fused linear cross entropy", spread_over(labels, run), [dense.weight])]


def of_cut_cross_entropy(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    from cut_cross_entropy import linear_cross_entropy

    candidates = []
    for impl in ("cce", "torch_compile"):
        run = lambda hidden, impl=impl: linear_cross_entropy(
            hidden.flatten(0, 1), dense.weight, labels.flatten(), impl=impl
        )
        candidates.append(Candidate(f"cut-cross-entropy {impl}", spread_over(labels, run), [dense.weight]))
    return candidates


def spread_over(labels: Tensor, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A mean loss, which peers compute, in the place of each token's; with equal upstream gradients the same."""
    return lambda hidden: run(hidden).float().expand(labels.shape)


class _FourGemms(torch.autograd.Function):
    """The products of a head that makes its logits twice, at their full size, and no softmax."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden.flatten(0, 1) @ weight.t())[:, :1].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        logits = hidden.flatten(0, 1) @ weight.t()
        return (logits @ weight).view_as(hidden), logits.t() @ hidden.flatten(0, 1)


def float64_reference(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Losses and gradients, 1024 tokens at a time."""
    wide, exact = weight.double(), {"loss": [], "hidden": []}
    weight_grad = torch.zeros_like(wide)
    for x, label, grad in zip(*(t.flatten(0, 1).split(1024) for t in (hidden, labels, upstream)), strict=True):
        logits = x.double() @ wide.t()
        log_sum = logits.logsumexp(dim=-1)
        exact["loss"].append(log_sum - logits.gather(1, label[:, None]).squeeze(1))
        logits.sub_(log_sum[:, None]).exp_().scatter_add_(1, label[:, None], -torch.ones_like(log_sum)[:, None])
        logits.mul_(grad.double()[:, None])
        exact["hidden"].append(logits @ wide)
        weight_grad.addmm_(logits.t(), x.double())
    return {name: torch.cat(parts) for name, parts in exact.items()} | {"weight": weight_grad}


def errors(candidate: Candidate, hidden: Tensor, upstream: Tensor, expected: dict[str, Tensor]) -> dict[str, float]:
    """RMS of the difference to float64, over the RMS of the expected values."""
    losses = step(candidate, hidden, upstream).detach()
    found = {"loss": losses, "hidden": hidden.grad, "weight": candidate.parameters[0].grad}
    return {name: float((found[name].view_as(exact) - exact).norm() / exact.norm()) for name, exact in expected.items()}


def report(results: list[Measurement], missing: dict[str, str], args: argparse.Namespace) -> str:
    by_name = {result.name: result for result in results}
    dense = by_name[DENSE]
    lines = [
        f"# LM head and loss, forward + backward, {datetime.date.today()}", "",
        f"{torch.cuda.get_device_name()}; {', '.join(f'{name} {installed(name)}' for name in PACKAGES)}. Command:", "",
        f"    python {' '.join(['benchmarks/lm_head.py', *sys.argv[1:]])}", "",
        f"{args.tokens} tokens, h={args.hidden_size}, vocabulary {args.vocabulary}, bf16, random data; medians of "
        f"{args.repeats} interleaved runs. Memory: the peak beyond weight, input and upstream gradient, less the bytes "
        "of the weight gradient; 'with main_grad': the same where that is held all the time and added to (ours: in "
        "place, peers: by a hook). Errors: relative RMS against float64, of losses and of the gradients of input "
        "and weight.", "",
        "| | ms | time | MiB | with main_grad | error: loss, dx, dW |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        error = ", ".join(f"{value:.2e}" for value in result.errors.values())
        memory = "" if result.name == LIMIT else f"{result.memory_mib:.0f} | {result.memory_with_main_grad_mib:.0f}"
        ratio = result.median / dense.median
        lines.append(f"| {result.name} | {result.median:.2f} | {ratio:.3f} | {memory or ' | '} | {error} |")
    lines += ["", *(f"Left out: {name} ({reason})." for name, reason in missing.items())]
    for result in results:
        if result.kernels:
            total = sum(time for _, _, time in result.kernels)
            gemms = sum(time for name, _, time in result.kernels if any(part in name.lower() for part in GEMM_KERNELS))
            lines += ["", f"Kernels of one step, {result.name}: {total:.2f} ms, {gemms:.2f} in GEMMs", ""]
            lines += ["| kernel | calls | ms |", "|---|---|---|"]
            lines += [f"| `{name[:100]}` | {calls} | {time:.3f} |" for name, calls, time in result.kernels[:14]]
    return "\n".join(lines) + "\n"


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--memory-mib", type=int, nargs="+", default=[160, DEFAULT_MEMORY_MIB, 1024])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    initialize()
    dense = output_layer(args.hidden_size, args.vocabulary)
    hidden = torch.randn(args.tokens, 1, args.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, args.vocabulary, (args.tokens, 1), device="cuda")
    upstream = torch.full((args.tokens, 1), 1 / args.tokens, device="cuda")
    expected = float64_reference(hidden.detach(), dense.weight.detach(), labels, upstream)
    expected = {name: exact.to("cpu", torch.float64) for name, exact in expected.items()}

    candidates, missing = of_megatron(dense, labels), {}
    for peers in (of_liger, of_cut_cross_entropy):
        try:
            candidates += peers(dense, labels)
        except ImportError as error:
            missing[peers.__name__.removeprefix("of_")] = str(error)
    candidates += of_ours(dense, labels, args.memory_mib)
    candidates.append(Candidate(LIMIT, lambda hidden: _FourGemms.apply(hidden, dense.weight), [dense.weight]))
    results = measure(candidates, hidden, upstream, args.repeats, {DENSE, OURS, LIMIT})
    expected = {name: exact.cuda() for name, exact in expected.items()}
    for candidate, result in zip(candidates, results, strict=True):
        if candidate.name != LIMIT:
            result.errors = errors(candidate, hidden, upstream, expected)
    args.results.mkdir(parents=True, exist_ok=True)
    text = report(results, missing, args)
    (args.results / f"{datetime.date.today()}-lm-head.md").write_text(text)
    print(text)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

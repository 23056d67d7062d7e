"""Log-probabilities (one column) and entropies of tokens, forward and backward: plain torch, peers, this package.

    python -m benchmarks.scores [--tokens 8192 --hidden-size 4096 --vocabulary 128256] [--packed 32768 151936]

Times are medians of interleaved runs in random order; memory is the peak beyond weight, its float32 ``main_grad``,
input and upstream gradients. Peers that are not installed are left out, and named. Of verl its Triton kernel is run.
``--packed`` takes the memory of one more size, ours and plain torch's. Writes a dated page into benchmarks/results/.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from benchmarks.arguments import output_folder, positive
from benchmarks.lm_head_candidates import initialize, of_ours, output_layer
from benchmarks.mlp_candidates import Candidate
from benchmarks.mlp_measure import MIB, measure_held, seconds, step
from benchmarks.record import RESULTS, Origin, machine
from megatron_tiling import tiled_scores
from megatron_tiling.tiles.head_cut import HeadTiles

OURS, LOSS, PLAIN = "tiled_scores", "our loss, 272 MiB", "plain torch, from logits"
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "verl")


def from_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``[s, b, 2]``: log-probability and entropy, in float32."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack([log_p.gather(-1, labels[..., None]).squeeze(-1), entropy], dim=-1)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
    scores = tiled_scores(hidden, weight, labels, entropy=True, fuse_wgrad=True, **options)  # type: ignore[arg-type]
    assert scores.entropy is not None
    return torch.stack([scores.log_probs, scores.entropy], dim=-1)


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    parts = zip(hidden.chunk(16), labels.chunk(16), strict=True)
    return torch.cat([tensor_parallel.checkpoint(from_logits, False, x, weight, part) for x, part in parts])


def of_verl() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        values = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), 1.0, "none")
        # It takes no gradient that has gaps, as those of a stack have.
        return torch.stack([value * 1 for value in values[:2]], dim=-1).view(*labels.shape, 2)

    return run


def of_liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=1)

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        x = hidden.view(8, -1, hidden.shape[-1])  # sequences, which are its chunks
        mask, advantages = torch.ones_like(labels.view(8, -1)), torch.ones(8, device=hidden.device)
        value = loss(x, weight, labels.view(8, -1), mask, advantages)[0]
        return value.float().expand(*labels.shape, 2)

    return run


def of_torch() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = F.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), reduction="none")
        return torch.stack([-losses, losses * 0], dim=-1).view(*labels.shape, 2)

    return run


def forward_only(run: Callable[[Tensor], Tensor], hidden: Tensor, repeats: int) -> tuple[float, float]:
    """Median milliseconds, and MiB at the peak."""
    with torch.no_grad():
        run(hidden)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(hidden)
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        return 1000 * statistics.median(seconds(partial(run, hidden)) for _ in range(max(repeats // 5, 1))), peak


def errors(candidate: Candidate, hidden: Tensor, upstream: Tensor, labels: Tensor, tokens: int) -> str:
    """Relative RMS to float64, of the first tokens: log-probabilities, entropies, input gradient."""
    wide = hidden[:tokens].detach().double().requires_grad_()
    log_p = (wide @ candidate.parameters[0].detach().double().t()).log_softmax(-1)
    exact = torch.stack([log_p.gather(-1, labels[:tokens, :, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)], -1)
    exact.backward(upstream[:tokens].double())
    found = step(candidate, hidden, upstream)[:tokens]
    assert hidden.grad is not None and wide.grad is not None
    pairs = [(found[..., 0], exact[..., 0]), (found[..., 1], exact[..., 1]), (hidden.grad[:tokens], wide.grad)]
    return ", ".join(f"{float((one.double() - right).norm() / right.norm()):.2e}" for one, right in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--hidden-size", type=positive, default=4096)
    parser.add_argument("--vocabulary", type=positive, default=128256)
    parser.add_argument("--packed", type=positive, nargs=2, metavar=("TOKENS", "VOCABULARY"))
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    initialize()
    dense = output_layer(args.hidden_size, args.vocabulary)
    weight = dense.weight
    hidden = torch.randn(args.tokens, 1, args.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, args.vocabulary, (args.tokens, 1), device="cuda")
    mask = torch.arange(args.tokens, device="cuda")[:, None] % 2 == 0
    upstream = torch.randn(args.tokens, 1, 2, device="cuda") / args.tokens

    half = {"mask": mask, "mask_count": (args.tokens + 1) // 2}
    runs: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        OURS: ours,
        f"{OURS}, float32 logits": partial(ours, logits_in_fp32=True),
        f"{OURS}, half of the tokens masked": partial(ours, **half),
        f"{OURS}, 1024 MiB": partial(ours, memory_mib=1024),
        PLAIN: from_logits,
        "plain torch, 16 chunks, checkpoint": in_chunks,
    }
    missing: dict[str, str] = {}
    peers = {
        "verl's fused kernel": of_verl,
        "Liger's chunked GRPO loss": of_liger,
        "torch's linear_cross_entropy": of_torch,
    }
    for name, make in peers.items():
        try:
            runs[name] = make()
            with torch.enable_grad():  # kernels that do not run here are left out too
                runs[name](hidden, weight, labels).backward(upstream)
        except Exception as error:
            runs.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    bound = {name: partial(lambda hidden, run: run(hidden, weight, labels), run=run) for name, run in runs.items()}
    loss = of_ours(dense, labels, {LOSS: HeadTiles(272)})[0]
    candidates = [Candidate(name, run, [weight]) for name, run in bound.items()]
    candidates.append(Candidate(LOSS, lambda hidden: loss.run(hidden)[..., None].expand(-1, -1, 2), [weight]))
    gemm = forward_only(lambda hidden: hidden @ weight.t(), hidden, args.repeats)[0]
    forward = {item.name: forward_only(item.run, hidden, args.repeats) for item in candidates}
    random.shuffle(candidates)
    results = {result.name: result for result in measure_held(candidates, hidden, upstream, args.repeats, set())}

    origin = Origin.now(PACKAGES, machine())
    lines = [
        *origin.head("Log-probabilities and entropies", "TP=1"),
        f"{args.tokens} tokens, h={args.hidden_size}, vocabulary {args.vocabulary}, bf16, random data; medians of "
        f"{args.repeats} interleaved runs forward and backward, of {max(args.repeats // 5, 1)} x 10 forward only. "
        f"One GEMM of all logits: {gemm:.2f} ms; times are over it, or over our loss. Memory: beyond weight, float32 "
        "main_grad, input and upstream gradient. Liger computes its gradients in the forward pass, and a loss alone. "
        "Errors to float64, relative RMS: log-probabilities, entropies, input gradient.",
        "",
        "| | forward, ms | / GEMM | MiB | forward + backward, ms | / our loss | MiB | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, result in results.items():
        compared = name in bound and "masked" not in name and "Liger" not in name and "torch's" not in name
        candidate = next(item for item in candidates if item.name == name)
        error = errors(candidate, hidden, upstream, labels, min(1024, args.tokens)) if compared else ""
        one, peak = forward[name]
        cells = (f"{one:.2f}", f"{one / gemm:.3f}", f"{peak:.0f}", f"{result.median:.2f}")
        ratio, memory = result.median / results[LOSS].median, result.memory_with_main_grad_mib
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.3f} | {memory:.0f} | {error} |")
    lines += ["", *(f"Left out: {name} ({reason})." for name, reason in missing.items())]
    if args.packed:
        lines += ["", *packed(*args.packed, args.hidden_size, (OURS, ours), (PLAIN, from_logits))]
    page = args.results / f"{origin.date}-scores.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


def packed(tokens: int, vocabulary: int, hidden_size: int, *runs: tuple[str, Callable[..., Tensor]]) -> list[str]:
    """Lines of a table: memory of a large micro-batch."""
    torch.cuda.empty_cache()
    weight = output_layer(hidden_size, vocabulary).weight
    hidden = torch.randn(tokens, 1, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens, 1), device="cuda")
    upstream = torch.randn(tokens, 1, 2, device="cuda") / tokens
    lines = [f"{tokens} tokens, vocabulary {vocabulary}:", "", "| | forward, MiB | forward + backward, ms | MiB |"]
    lines.append("|---|---|---|---|")
    for name, run in runs:
        try:
            bound = partial(lambda hidden, run: run(hidden, weight, labels), run=run)
            _, peak = forward_only(bound, hidden, 1)
            result = measure_held([Candidate(name, bound, [weight])], hidden, upstream, 2, set())[0]
            cells = f"{peak:.0f} | {result.median:.1f} | {result.memory_with_main_grad_mib:.0f}"
        except torch.cuda.OutOfMemoryError as error:
            cells = f"out of memory: {str(error).split('.')[1].strip()} | | "
        torch.cuda.empty_cache()
        lines.append(f"| {name} | {cells} |")
    return lines


if __name__ == "__main__":
    main()

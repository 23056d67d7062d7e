"""Peers side by side: one SwiGLU MLP, forward and backward, on one GPU.

    python -m benchmarks.mlp [--sizes 4096x14336 8192x28672] [--tokens 8192] [--repeats 25] [--results DIR]

Writes ``<date>-mlp.md`` (times, memory, errors, kernels), ``.json`` (the same for mlp_report.py) and ``.png`` (the
time/memory frontier). Every size has a process of its own: a compiled activation that has seen another size gets a
slow dynamic-shape kernel. Needs deepspeed and liger-kernel; a peer that cannot be imported is left out, by name.
"""

import json
from dataclasses import asdict

from benchmarks.each_size import measured

PACKAGES = ("torch", "triton", "megatron-core", "deepspeed", "liger-kernel")
DENSE = "dense Megatron-core"
OURS: list[tuple[int, int | None, bool]] = [
    *[(1, None, False), (4, None, False), (8, None, False), (4, 2, False), (4, 0, False), (8, 0, False)],
    *[(4, 0, True), (8, 0, True)],
]
PROFILED = {DENSE, *(f"ours: TiledMLP T={rest}" for rest in ("1 keep all", "4 keep all", "4 keep none", "8 keep none"))}


def run_size(hidden_size: int, ffn_hidden_size: int, tokens: int, repeats: int) -> dict:
    """All candidates at one size, in this process."""
    import torch

    from benchmarks import mlp_candidates as candidates
    from benchmarks import mlp_measure as measure

    # The chunks of some peers must not turn dense's activation into a dynamic-shape kernel, nor their own.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.manual_seed(0)
    candidates.initialize()
    dense = candidates.megatron_mlp(hidden_size, ffn_hidden_size)
    hidden = torch.randn(tokens, 1, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(hidden)
    chosen, missing = candidates.of_megatron(dense), {}
    for peers in (candidates.of_deepspeed, candidates.of_liger):
        try:
            chosen += peers(dense)
        except ImportError as error:
            missing[peers.__name__.removeprefix("of_")] = str(error)
    chosen += candidates.of_ours(dense, OURS)
    results = measure.measure(chosen, hidden, grad_output, repeats, PROFILED)
    expected = measure.reference(hidden, dense.linear_fc1.weight, dense.linear_fc2.weight, grad_output)
    for candidate, result in zip(chosen, results, strict=True):
        if candidate.layers or candidate.name == DENSE:
            result.errors = measure.errors(candidate, hidden, grad_output, expected)
    torch.distributed.destroy_process_group()
    return {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "tokens": tokens,
        "repeats": repeats,
        "gpu": torch.cuda.get_device_name(),
        "activations": measure.activation_bandwidths(tokens, ffn_hidden_size),
        "missing": missing,
        "candidates": [
            {**vars(result), "median": result.median, "spread": spread(result.milliseconds)} for result in results
        ],
    }


def spread(milliseconds: list[float]) -> float:
    """Half the distance between the quartiles."""
    ordered = sorted(milliseconds)
    return (ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]) / 2


def main() -> None:
    args, origin, runs = measured(__doc__, PACKAGES, 25, run_size)
    path = args.results / f"{origin.date}-mlp.json"
    path.write_text(json.dumps({"origin": asdict(origin), "runs": runs}))
    from benchmarks import mlp_report

    mlp_report.write(path)


if __name__ == "__main__":
    main()

"""One SwiGLU MLP with its norm, of TransformerEngine's layers, dense and tiled, beside peers: time and memory.

    python -m benchmarks.te_mlp [--sizes 4096x14336 8192x28672] [--tokens 8192] [--repeats 20] [--results DIR]

Weights and float32 gradients (``main_grad``) are held all the time and not counted; Megatron's layers, dense or tiled,
add to them within their GEMMs, peers by a hook. Every size has a process of its own, candidates run interleaved in
random order.
"""

import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.each_size import measured
from benchmarks.record import Origin, kernel_lines, machine

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "liger-kernel", "quack-kernels", "deepspeed")
DENSE = "TransformerEngine"
#: Tiles, and how many keep their pre-activations.
OURS: tuple[tuple[int, int | str], ...] = ((1, "all"), (2, "all"), (4, "all"), (4, 2), (4, 0), (8, 0))


def build(hidden_size: int, ffn_hidden_size: int) -> Any:
    """Megatron's MLP on TransformerEngine's layers, the norm in fc1."""
    import torch
    import torch.nn.functional as F
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, num_attention_heads=hidden_size // 128,
        normalization="RMSNorm", params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=True, gradient_accumulation_fusion=True,
    )  # fmt: skip
    submodules = MLPSubmodules(linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
    return torch.nn.ModuleDict({"mlp": MLP(config, submodules, ffn_hidden_size=ffn_hidden_size)}).cuda()


def of_megatron(dense: Any, shape: tuple[int, int]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Dense, recomputed and tiled ones, on the weights of ``dense``."""
    from megatron.core import tensor_parallel

    from benchmarks.gpt import share
    from megatron_tiling import TilingConfig, tile

    yield DENSE, lambda hidden: dense.mlp(hidden)[0]
    yield f"{DENSE}, recompute mlp", lambda hidden: tensor_parallel.checkpoint(dense.mlp, False, hidden)[0]
    for tiles, keep in OURS:
        model = build(*shape)
        share(model, dict(dense.named_parameters()))
        tile(model, TilingConfig(factor=tiles, modules=("fc1", "fc2"), mlp_keep=keep))  # type: ignore[arg-type]
        yield f"ours: T={tiles} keep {keep}", lambda hidden, mlp=model.mlp: mlp(hidden)[0]


def of_peers(dense: Any, shape: tuple[int, int]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Those that are installed, behind the same norm, on the same weights."""
    import torch
    from torch.nn.functional import rms_norm

    fc1, fc2 = dense.mlp.linear_fc1, dense.mlp.linear_fc2

    def normalized(hidden: Any) -> Any:
        return rms_norm(hidden, hidden.shape[-1:], fc1.layer_norm_weight, fc1.eps)

    try:
        from quack.mlp import mlp_func

        yield (
            "quack, recompute fc1",
            lambda hidden: mlp_func(normalized(hidden), fc1.weight, fc2.weight, activation="swiglu", recompute=True),
        )
    except ImportError as error:
        print(f"quack left out: {error}", flush=True)
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP as AlstTiledMLP

        parameters = list(dense.parameters())

        def alst(hidden: Any) -> Any:  # it chunks the dimension before the last: [tokens, h]
            tokens = hidden.flatten(0, 1)
            return AlstTiledMLP.apply(lambda mlp, part: mlp(part)[0], dense.mlp, tokens, 4, parameters).view_as(hidden)

        yield "DeepSpeed ALST T=4", alst
    except ImportError as error:
        print(f"ALST left out: {error}", flush=True)
    try:
        from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

        class Config:
            hidden_size, intermediate_size, hidden_act = *shape, "silu"

        mlp = LigerTiledSwiGLUMLP(Config(), num_shards=4).to("cuda", torch.bfloat16)
        mlp.gate_proj.weight, mlp.up_proj.weight = (torch.nn.Parameter(part) for part in fc1.weight.detach().chunk(2))
        mlp.down_proj.weight = fc2.weight
        for half, main_grad in zip((mlp.gate_proj, mlp.up_proj), fc1.weight.main_grad.chunk(2), strict=True):
            half.weight.main_grad = main_grad
            half.weight.register_post_accumulate_grad_hook(add_to_main_grad)

        yield "Liger TiledSwiGLU T=4", lambda hidden: mlp(normalized(hidden).flatten(0, 1)).view_as(hidden)
    except ImportError as error:
        print(f"Liger left out: {error}", flush=True)


def add_to_main_grad(parameter: Any) -> None:
    """What Megatron's DDP does with a gradient that was not fused."""
    if not getattr(parameter, "grad_added_to_main_grad", False):
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def run_size(hidden_size: int, ffn_hidden_size: int, tokens: int, repeats: int) -> dict[str, Any]:
    import torch

    from benchmarks import gpt
    from benchmarks import mlp_measure as measure
    from benchmarks.mlp_candidates import Candidate

    shape = hidden_size, ffn_hidden_size
    gpt.initialize()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch._dynamo.config.automatic_dynamic_shapes = False
    model_parallel_cuda_manual_seed(7)
    dense = build(*shape)
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(add_to_main_grad)
    hidden = torch.randn(tokens, 1, shape[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(hidden)
    rows: dict[str, dict[str, Any]] = {}
    chosen = []
    exact: dict[str, Any] = {}
    for name, run in (*of_megatron(dense, shape), *of_peers(dense, shape)):
        candidate = Candidate(name, run, [])
        for parameter in dense.parameters():
            parameter.main_grad.zero_()
            parameter.grad_added_to_main_grad = False
        try:
            output = measure.step(candidate, hidden, grad_output)
        except Exception as error:  # a peer that is installed and does not run here
            if name.startswith((DENSE, "ours")):
                raise
            print(f"{name} left out: {error}", flush=True)
            continue
        found = {"output": output.detach(), "hidden": hidden.grad}
        found |= {key: parameter.main_grad.clone() for key, parameter in dense.named_parameters()}
        exact = exact or found
        differences = {key: float((found[key] - value).norm() / value.norm()) for key, value in exact.items()}
        for _ in range(3):
            measure.step(candidate, hidden, grad_output)
        del output, found
        memory = measure.peak_memory(candidate, hidden, grad_output, held=True)
        rows[name] = {"name": name, "memory_mib": memory, "differences": differences, "milliseconds": []}
        chosen.append(candidate)
    for _ in range(repeats):
        for candidate in random.sample(chosen, len(chosen)):
            rows[candidate.name]["milliseconds"].append(measure.time_once(candidate, hidden, grad_output))
    for candidate in chosen:
        rows[candidate.name]["kernels"] = measure.kernel_table(candidate, hidden, grad_output)
    torch.distributed.destroy_process_group()
    return {"shape": shape, "gpu": machine(), "candidates": list(rows.values())}


def markdown(record: dict[str, Any]) -> str:
    lines = [
        *Origin(**record["origin"]).head("An MLP of TransformerEngine's layers, with its norm", "main_grad held"),
        f"{record['tokens']} tokens, bf16, random data, medians of {record['repeats']} interleaved runs. Differences: "
        "relative RMS from dense's output, and the largest of those of the gradients.",
    ]
    for run in record["runs"]:
        dense = run["candidates"][0]
        base = statistics.median(dense["milliseconds"])
        lines += ["", f"## h={run['shape'][0]}, ffn={run['shape'][1]}", ""]
        lines += ["| | ms | time | MiB | memory | output | gradients |", "|---" * 7 + "|"]
        for row in run["candidates"]:
            median = statistics.median(row["milliseconds"])
            gradients = max(value for key, value in row["differences"].items() if key != "output")
            lines.append(
                f"| {row['name']} | {median:.2f} | {median / base:.3f} | {row['memory_mib']:.0f} | "
                f"{row['memory_mib'] / dense['memory_mib']:.3f} | {row['differences']['output']:.1e} | "
                f"{gradients:.1e} |"
            )
        for row in run["candidates"]:
            if row["name"] in (DENSE, "ours: T=4 keep all"):
                lines += kernel_lines(f"Kernels of {row['name']}", row["kernels"])
    return "\n".join(lines) + "\n"


def main() -> None:
    args, origin, runs = measured(__doc__, PACKAGES, 20, run_size)
    record = {"origin": asdict(origin), "tokens": args.tokens, "repeats": args.repeats, "runs": runs}
    path = args.results / f"{origin.date}-mlp-te.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    print(markdown(record), flush=True)


if __name__ == "__main__":
    main()

"""Loss curves of LoRA on a frozen GPT of TransformerEngine's layers, dense and tiled, at one tensor-parallel size.

    torchrun --standalone --nproc-per-node TP -m benchmarks.lora_parity [--iterations 50] [--attention auto]
        [--sequence-parallel] [--results DIR]

All runs start from the same weights and see the same data; bf16, adapters' gradients and master weights in float32.
The yardstick is a second dense run with half the micro-batch, which differs from the first by nothing but the order of
sums. Adapters are those of Megatron-Bridge, as in ``benchmarks.lora``.

Under sequence parallelism curves part where TransformerEngine drops the gradient of a gathered norm's output, as 2.17.1
and 2.20.2 do: docs/integrations.md.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpt, lora
from benchmarks.arguments import above_zero, output_folder
from benchmarks.loss_parity import difference
from benchmarks.record import RESULTS, Origin, machine

DENSE = "dense"
#: Micro-batches of an iteration, and settings of the tiling, if any.
KINDS: dict[str, tuple[int, dict[str, Any] | None]] = {
    DENSE: (1, None),
    "dense, half the micro-batch": (2, None),
    "tiled, keep all": (1, {"factor": 4, "mlp_keep": "all"}),
    "tiled, keep 0": (1, {"factor": 4, "mlp_keep": 0}),
    "tiled, all modules": (1, {"factor": 4, "modules": ("qkv", "proj", "fc1", "fc2", "output")}),
}


def batches(args: argparse.Namespace) -> Iterator[dict[str, Tensor | None]]:
    """Sequences in which one token follows another by a rule, nine times of ten."""
    generator = torch.Generator().manual_seed(3)
    rule = torch.randperm(args.vocabulary, generator=generator)
    while True:
        tokens = torch.randint(0, args.vocabulary, (args.batch, args.sequence + 1), generator=generator)
        follows = torch.rand(tokens.shape, generator=generator) < 0.9
        for column in range(1, args.sequence + 1):
            tokens[:, column] = torch.where(follows[:, column], rule[tokens[:, column - 1]], tokens[:, column])
        yield {
            "input_ids": tokens[:, :-1].cuda(),
            "position_ids": torch.arange(args.sequence, device="cuda").expand(args.batch, -1),
            "attention_mask": None,
            "labels": tokens[:, 1:].cuda(),
        }


def train(args: argparse.Namespace, parallel: dict[str, Any], kind: str) -> list[float]:
    """Losses of one run."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.resident.mlp import TiledMLP

    micro_batches, tiling = KINDS[kind]
    ddp = gpt.with_main_grad(lora.build(args, parallel))
    if tiling is not None:
        tile(ddp.module, TilingConfig(**tiling))
        mlps = [module for module in ddp.module.modules() if isinstance(module, TiledMLP)]
        reasons = {mlp.reason_for_stock_forward() for mlp in mlps}
        assert len(mlps) == args.layers and reasons == {""}, reasons
    adapters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float() for parameter in adapters]
    optimizer = torch.optim.Adam(masters, lr=args.lr)
    losses = []
    for _, inputs in zip(range(args.iterations), batches(args), strict=False):
        ddp.zero_grad_buffer()
        parts: list[Tensor] = []
        for index in range(micro_batches):
            rows = slice(index * args.batch // micro_batches, (index + 1) * args.batch // micro_batches)
            part = ddp(**{name: None if value is None else value[rows] for name, value in inputs.items()}).mean()
            (part / micro_batches).backward()
            parts.append(part.detach())
        finalize_model_grads([ddp])
        for master, parameter in zip(masters, adapters, strict=True):
            master.grad = parameter.main_grad.float()
        optimizer.step()
        for master, parameter in zip(masters, adapters, strict=True):
            parameter.data.copy_(master)
        losses.append(float(torch.stack(parts).mean()))
    return losses


def page(args: argparse.Namespace, curves: dict[str, list[float]]) -> str:
    world = torch.distributed.get_world_size()
    where, sp = f"attention: {args.attention}", " with sequence parallelism" * args.sequence_parallel
    lines = [
        *Origin.now(gpt.PACKAGES, machine(several=world > 1)).head(f"LoRA, loss parity at TP={world}{sp}", where),
        f"Loss over {args.iterations} iterations; differences against dense:",
        "",
        "| | first loss | last loss | largest difference | mean |",
        "|---|---|---|---|---|",
    ]
    for kind, curve in curves.items():
        lines.append(f"| {kind} | {curve[0]:.4f} | {curve[-1]:.4f} | {difference(curves[DENSE], curve)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 4, "hidden_size": 1024, "ffn_hidden_size": 2816, "query_groups": 2, "vocabulary": 8192}
    gpt.add_shape(parser, **shape, sequence=512, batch=8, rank=16, iterations=50)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--lr", type=above_zero, default=2e-3)
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    world = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(world)
    parallel = {"tensor_model_parallel_size": world, "sequence_parallel": args.sequence_parallel}
    curves = {kind: train(args, parallel, kind) for kind in KINDS}
    if torch.distributed.get_rank() == 0:
        text = page(args, curves)
        date = Origin.now((), "").date
        (args.results / f"{date}-lora-parity-tp{world}{'-sp' * args.sequence_parallel}.md").write_text(text)
        print(text, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""LoRA on all linear layers of a frozen 8B GPT on TransformerEngine, dense and tiled: time, memory, kernels.

    python -m benchmarks.lora [--layers 32] [--sequence 2048] [--batch 4] [--rank 16] [--repeats 10] [--attention auto]
        [--results DIR]

As ``benchmarks.whole_model``, with frozen weights: memory is the peak less what is held between steps, which are
weights, adapters and their gradients. Adapters are those of Megatron-Bridge; its folder ``peft`` is enough, with the
three modules of ``megatron.bridge.utils`` that it imports.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import gpt, whole_model
from benchmarks.arguments import at_least, output_folder
from benchmarks.record import RESULTS

LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def settings(args: argparse.Namespace) -> Iterator[whole_model.Setting]:
    yield whole_model.DENSE, {}, None
    yield "dense, recompute mlp", {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, None
    for factor, keep in ((4, "all"), (4, 2), (4, 0), (8, 0)) if args.more else ((4, "all"), (4, 2), (4, 0)):
        yield f"tiled: factor {factor}, keep {keep}", {}, {"factor": factor, "mlp_keep": keep}


def build(args: argparse.Namespace, changes: dict[str, Any]) -> Any:
    """A frozen model with adapters."""
    from megatron.bridge.peft.lora import LoRA

    model = gpt.build(args, changes)
    return LoRA(target_modules=LINEARS, dim=args.rank, alpha=2 * args.rank)([model], training=True)[0].cuda()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "query_groups": 8, "vocabulary": 128256}
    gpt.add_shape(parser, **shape, sequence=2048, batch=4, rank=16)
    parser.add_argument("--repeats", type=at_least(2), default=10)
    parser.add_argument("--more", action="store_true", help="more settings of the tiling")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--name", default="lora")
    args = parser.parse_args()
    gpt.initialize()
    found, ddp = whole_model.candidates(args, settings(args), build)
    whole_model.measure(found, ddp, args.repeats, firsts=False)
    whole_model.save(
        found, args, f"LoRA of rank {args.rank} on a frozen GPT of {args.layers} layers, forward and backward"
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

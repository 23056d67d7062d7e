"""Speed of the three GEMMs of one tile of the LM head, by the tile's width: whether some widths are better.

    python -m benchmarks.head_gemms [--tokens 8192 4096] [--hidden-size 4096] [--narrowest 4096 --widest 33792]

Logits into bf16, the input gradient's and the weight gradient's sums in float32, all widths that are multiples of 256,
in random order. Writes a dated page into benchmarks/results/.
"""

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.arguments import output_folder, positive
from benchmarks.mlp_measure import seconds
from benchmarks.record import RESULTS, Origin, machine
from megatron_tiling.tiles.gemm import gemm_into, scratch

ALIGNMENT = 256
NAMES = ("logits", "dgrad", "wgrad")


def products(x: Tensor, weight: Tensor, main_grad: Tensor, dx: Tensor, width: int) -> list[Callable[[], None]]:
    """Of x ``[n, h]`` and the first ``width`` rows of weight ``[v, h]``, as the loop has them."""
    logits = scratch(x, len(x), width)
    logits.normal_()
    rows = weight[:width]
    made = torch.empty_like(logits)
    return [
        lambda: gemm_into(made, x, rows.t(), accumulate=False),
        lambda: gemm_into(dx, logits, rows, accumulate=True),
        lambda: gemm_into(main_grad[:width], logits.t(), x, accumulate=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8192, 4096])
    parser.add_argument("--hidden-size", type=positive, default=4096)
    parser.add_argument("--narrowest", type=positive, default=4096)
    parser.add_argument("--widest", type=positive, default=33792)
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    if args.narrowest > args.widest:
        parser.error(f"--narrowest {args.narrowest} is above --widest {args.widest}")
    weight = torch.randn(args.widest, args.hidden_size, device="cuda", dtype=torch.bfloat16) / args.hidden_size**0.5
    main_grad = torch.zeros(args.widest, args.hidden_size, device="cuda")
    origin = Origin.now(("torch",), machine())
    count = torch.cuda.get_device_properties(0).multi_processor_count
    lines = origin.head("GEMMs of a tile of the LM head, by its width", f"{count} multiprocessors")
    lines += [f"h={args.hidden_size}, bf16, random data, medians of ten. TFLOP/s."]
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden_size, device="cuda", dtype=torch.bfloat16)
        dx = torch.zeros(tokens, args.hidden_size, device="cuda")
        widths = list(range(-(-args.narrowest // ALIGNMENT) * ALIGNMENT, args.widest + 1, ALIGNMENT))
        speed = {}
        for width in random.sample(widths, len(widths)):
            operations = 2e-12 * tokens * width * args.hidden_size
            runs = products(x, weight, main_grad, dx, width)
            speed[width] = [operations / seconds(run) for run in runs]
        lines += ["", f"{tokens} tokens:", "", f"| width | {' | '.join(NAMES)} | all three |", "|---|---|---|---|---|"]
        for width in widths:
            together = len(NAMES) / sum(1 / value for value in speed[width])
            lines.append(f"| {width} | {' | '.join(f'{value:.0f}' for value in [*speed[width], together])} |")
    page = args.results / f"{origin.date}-head-gemms.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()

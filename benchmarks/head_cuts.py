"""Time of the tiled head's loss against its memory, for the shard that a rank of TP=1, 2 or 4 has, on one GPU.

    python -m benchmarks.head_cuts --ranks 4 [--sweep] [--tokens 8192 --hidden-size 4096 --vocabulary 128256]

Nothing is communicated: what is compared are GEMMs, kernels and cuts, with those of Megatron's fused loss on the same
shard. Bounds are cut as under sequence parallelism, where the input gradient of several token tiles takes more memory
while it is reduced; that memory is in the bound, and not in the measured peak. ``--sweep`` times other cuts too, from
which the weights of ``tiles/head_cut.py`` are taken. Writes a dated page and a record into benchmarks/results/.
"""

import argparse
import json
from dataclasses import asdict

import torch

from benchmarks.arguments import output_folder, positive
from benchmarks.lm_head_candidates import (
    FUSED,
    FixedCut,
    initialize,
    of_four_gemms,
    of_megatron_fused,
    of_ours,
    output_layer,
)
from benchmarks.mlp_measure import measure_held
from benchmarks.record import RESULTS, Origin, kernel_lines, machine
from megatron_tiling.tiles.head_cut import HeadCut, HeadSizes, HeadTiles

BOUNDS = (160, 272, 320, 400, 512, 650, 1024, 2560)


def chosen(sizes: HeadSizes) -> dict[str, HeadCut]:
    """What bounds and ``keep`` choose; a cut that a smaller bound gives too is left out."""
    cuts: dict[str, HeadCut] = {}
    for bound in BOUNDS:
        cut = HeadTiles(bound).cut(sizes)
        if cut not in cuts.values():
            cuts[f"{bound} MiB"] = cut
    return {"272 MiB, keep 0": HeadTiles(272, keep=0).cut(sizes)} | cuts


def swept(sizes: HeadSizes) -> dict[str, HeadCut]:
    """One or more token tiles by narrow and wide vocabulary tiles, the last of which stays or not."""
    cuts = {}
    for token_tiles in (1, 2, 4, 8):
        for columns in (2048, 4096, 8192, 16384, sizes.vocabulary):
            if columns <= sizes.vocabulary and sizes.tokens // token_tiles * columns < 2**30:
                tiles = HeadTiles(tokens=sizes.tokens // token_tiles, vocabulary_tiles=-(-sizes.vocabulary // columns))
                cuts[f"sweep {token_tiles} x {columns}"] = tiles.cut(sizes)._replace(kept=0)
    return cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=1)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--hidden-size", type=positive, default=4096)
    parser.add_argument("--vocabulary", type=positive, default=128256)
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    args = parser.parse_args()
    initialize()
    vocabulary = args.vocabulary // args.ranks
    dense = output_layer(args.hidden_size, vocabulary)
    hidden = torch.randn(args.tokens, 1, args.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (args.tokens, 1), device="cuda")
    upstream = torch.full((args.tokens, 1), 1 / args.tokens, device="cuda")

    sizes = HeadSizes(args.tokens, vocabulary, args.hidden_size, reduced_by=args.ranks if args.ranks > 1 else 0)
    cuts = chosen(sizes) | (swept(sizes) if args.sweep else {})
    ours = of_ours(dense, labels, {name: FixedCut(cut) for name, cut in cuts.items()})
    candidates = [of_megatron_fused(dense, labels), of_four_gemms(dense), *ours]
    results = measure_held(candidates, hidden, upstream, args.repeats, {FUSED, "272 MiB"})

    origin = Origin.now(("torch", "triton", "megatron-core"), machine())
    fused = next(result.median for result in results if result.name == FUSED)
    lines = [
        *origin.head("The tiled loss: time against memory", f"the shard of TP={args.ranks}, on one GPU"),
        f"{args.tokens} tokens, h={args.hidden_size}, {vocabulary} columns, bf16, forward and backward; medians of "
        f"{args.repeats} interleaved runs; float32 main_grad held all the time and added to.",
        "",
        "| | tiles, tokens x columns | of one tile | logits kept | ms | time | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cut = cuts.get(result.name)
        cells = ["", "", ""]
        if cut is not None:
            kept = cut.kept * cut.height * cut.width / (args.tokens * vocabulary)
            cells = [f"{len(cut.tokens)} x {len(cut.columns)}", f"{cut.height} x {cut.width}", f"{kept:.1%}"]
        cells += [f"{result.median:.2f}", f"{result.median / fused:.3f}", f"{result.memory_with_main_grad_mib:.0f}"]
        lines.append(f"| {result.name} | {' | '.join(cells)} |")
    for result in results:
        if result.kernels:
            lines += kernel_lines(f"Kernels of one step, {result.name}", result.kernels[:12])
    page = args.results / f"{origin.date}-head-cuts-tp{args.ranks}.md"
    page.write_text("\n".join(lines) + "\n")
    record = {**asdict(origin), "results": [asdict(result) for result in results]}
    page.with_suffix(".json").write_text(json.dumps(record, indent=1))
    print(page.read_text())


if __name__ == "__main__":
    main()

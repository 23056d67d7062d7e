"""How long a context trains on one GPU, and how fast: every recompute setting of Megatron's, and tiled models.

    python -m benchmarks.longest_context [--layers 28 --hidden-size 3072 ... --tied] [--attention flash] [--name NAME]
    torchrun --standalone --nproc-per-node 2 -m benchmarks.longest_context --experts 128 --expert-parallel 2 ...

One process, one set of parameters: bf16 weights, float32 gradients (``main_grad``), Megatron's optimizer with float32
weights and moments, all on this GPU. A step is forward, backward and optimizer, one sequence a step. First the longest
sequence that fits, up to ``--sequence``, is sought for each setting, in steps of 1024 tokens. Then, at the longest one
of each stock setting, its tokens a second are measured beside those of the tiled settings that go at least 1.5 times as
far. What was found so far is written after each of them. ``--known RECORD.json`` takes the longest contexts from an
earlier record of the same model on the same machine, and searches for those of other settings alone. Those of another
machine, or of other versions, are where the search begins.

Under torchrun experts are divided among the ranks (``--expert-parallel``), all else is data parallel: each rank has a
sequence of its own, all of the same length. A length fits where no rank allocates more than 98% of its memory. A rank
that runs out of it all the same ends the run.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpt, ranks
from benchmarks.arguments import above_zero, output_folder, positive
from benchmarks.context_search import FARTHER, MOST, STEP, Search, Setting, take_known
from benchmarks.record import RESULTS, Origin, machine

GIB = 2**30


def settings(experts: bool) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Name, changes of Megatron's config, and settings of the tiling, if any; of a model with experts or without."""

    def selective(*modules: str) -> dict[str, Any]:
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}

    def full(layers: int) -> dict[str, Any]:
        """Inputs of every so many layers are kept."""
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": layers}

    head: dict[str, Any] = {"modules": ("output",)}
    yield "stock", {}, None
    if experts:
        yield "stock, recompute moe_act", selective("moe_act"), None
        yield "stock, recompute moe", selective("moe"), None
        yield "stock, full recompute", full(1), None
        yield "tiled: output alone", {}, head
        yield "tiled: output alone, recompute moe_act", selective("moe_act"), head
        yield "tiled: output alone, recompute moe", selective("moe"), head
        yield "tiled: default", {}, {}
        yield "tiled: keep 0", {}, {"mlp_keep": 0}
        yield "tiled: output alone, full recompute", full(1), head
        yield "tiled: keep 0, full recompute", full(1), {"mlp_keep": 0}
        return
    yield "stock, recompute core_attn", selective("core_attn"), None
    yield "stock, recompute mlp", selective("mlp"), None
    yield "stock, recompute core_attn mlp", selective("core_attn", "mlp"), None
    yield "stock, 4 MLP chunks", {"mlp_chunks_for_training": 4}, None
    yield "stock, full recompute", full(1), None
    yield "stock, full recompute by 2 layers", full(2), None
    yield "tiled: output alone", {}, head
    yield "tiled: output alone, recompute mlp", selective("mlp"), head
    yield "tiled: default", {}, {}
    yield "tiled: keep 0", {}, {"mlp_keep": 0}
    yield "tiled: keep 0, recompute core_attn", selective("core_attn"), {"mlp_keep": 0}
    yield "tiled: output alone, full recompute", full(1), head
    yield "tiled: keep 0, full recompute", full(1), {"mlp_keep": 0}
    yield "tiled: output alone, full recompute by 2 layers", full(2), head
    yield "tiled: keep 0, full recompute by 2 layers", full(2), {"mlp_keep": 0}


class Trainer:
    """Training steps of any of the models on the parameters of the first."""

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_tiling import TilingConfig, tile
        from megatron_tiling.report import table

        self._args = args
        self.found: list[Setting] = []
        parallel = {"expert_model_parallel_size": args.expert_parallel} if args.expert_parallel > 1 else {}
        for name, changes, tiling in settings(bool(args.experts)):
            if args.settings and name not in args.settings:
                continue
            model = gpt.build(args, changes | parallel)
            if not self.found:
                parameters = dict(model.named_parameters())
            else:
                gpt.share(model, parameters)
            if tiling is not None:
                ranks.say(f"{name}:\n{table(tile(model, TilingConfig(**tiling)))}")
            self.found.append(Setting(name, model, tiling is not None))
            gc.collect()  # the parameters that it was built with
            torch.cuda.empty_cache()
        first = self.found[0].model
        self._ddp = gpt.with_main_grad(first)
        if ranks.count() > 1:
            self._ddp.broadcast_params()
            torch.cuda.manual_seed(1 + torch.distributed.get_rank())  # of the tokens
        options = OptimizerConfig(optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0)
        self._optimizer = get_megatron_optimizer(options, [self._ddp])
        self.step(self.found[0], STEP)  # makes the moments
        self.held = ranks.largest(torch.cuda.memory_allocated())[0]
        ranks.say(f"held between steps: {self.held / GIB:.1f} GiB")

    def step(self, setting: Setting, tokens: int) -> float | None:
        """Seconds of one step, or ``None`` where the memory does not suffice.

        Raises:
            RuntimeError: it does not on this rank, and others wait for it.
        """
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        fits = False
        torch.cuda.reset_peak_memory_stats()
        inputs = gpt.batch(self._args, tokens)
        try:
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            ranks.largest(0)  # all begin together
            torch.cuda.synchronize()
            start.record()
            setting.model(**inputs).mean().backward()
            self._ddp.finish_grad_sync()
            self._optimizer.step()
            stop.record()
            torch.cuda.synchronize()
            fits = True
        except torch.OutOfMemoryError as error:
            if ranks.count() > 1:
                raise RuntimeError(f"{setting.name}: out of memory at {tokens} tokens") from error
        rotary: Any = type(setting.model.rotary_pos_emb).forward
        rotary.cache_clear()  # keeps a table for every length
        if fits:
            peak, seconds = torch.cuda.max_memory_allocated() / GIB, start.elapsed_time(stop) / 1000
            if ranks.count() > 1:
                peak, seconds, beyond = ranks.largest(peak, seconds, peak - self._own_limit())
                fits = beyond <= 0
        if not fits:
            gc.collect()
            torch.cuda.empty_cache()
            return None
        setting.peaks[tokens] = peak
        return seconds

    def limit(self) -> float:
        """GiB that every rank can allocate."""
        return -ranks.largest(-self._own_limit())[0]

    def _own_limit(self) -> float:
        """GiB that this process can allocate."""
        free, total = torch.cuda.mem_get_info()
        allowed = (self._args.gpu_memory_gib or total / GIB) * GIB
        return min(allowed, free + torch.cuda.memory_reserved()) / GIB


def markdown(record: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in record["settings"]}
    median = {
        name: {int(tokens): statistics.median(seconds) for tokens, seconds in row["seconds"].items() if seconds}
        for name, row in rows.items()
    }

    def or_more(longest: int) -> str:
        return " or more" * (longest + STEP > record["most"])

    lines = [
        *Origin(**record["origin"]).head(f"The longest context that trains on {gpus_of(record)}", record["model"]),
        f"Held between steps: {record['held']:.1f} GiB (bf16 weights, float32 gradients, weights and moments). "
        f"Lengths in steps of {STEP} tokens; the allocator's segments are expandable.", "", *remarks(record),
        "| | longest | peak, GiB | tokens/s there |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows.items():
        longest = row["longest"]
        peak = row["peaks"][str(longest)]
        speed = f"{longest / median[name][longest]:.0f}" if longest in median[name] else "not measured"
        lines.append(f"| {name} | {longest}{or_more(longest)} | {peak:.1f} | {speed} |")
    lines += [
        "", "At the longest context of each stock setting: the fastest of the tiled ones that go "
        f"{FARTHER} times as far (medians of {record['repeats']} interleaved steps).", "",
        "| stock setting | tokens | tokens/s | tiled setting | its longest, times | its tokens/s, times |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows.items():
        if row["tiled"]:
            continue
        tokens = row["longest"]
        if tokens not in median[name]:
            continue
        speed = tokens / median[name][tokens]
        answers = sorted(
            (median[other][tokens], other) for other in rows if rows[other]["tiled"] and tokens in median[other]
        )
        for seconds, other in answers:
            farther = rows[other]["longest"] / tokens
            lines.append(
                f"| {name} | {tokens} | {speed:.0f} | {other} | {farther:.2f}{or_more(rows[other]['longest'])} | "
                f"{tokens / seconds / speed:.3f} |"
            )
        if not answers:
            lines.append(f"| {name} | {tokens} | {speed:.0f} | none goes that far | | |")
    return "\n".join(lines) + "\n"


def gpus_of(record: dict[str, Any]) -> str:
    return "one GPU" if record["gpus"] == 1 else f"{record['gpus']} GPUs"


def remarks(record: dict[str, Any]) -> list[str]:
    """What is to be known of a run, in paragraphs."""
    found = []
    if "moe_router" in record:
        found.append(f"Experts: {record['moe_router']}.")
    if record["gpus"] > 1:
        found.append(
            f"Experts are divided among {gpus_of(record)} (alltoall dispatcher), all else is data parallel: each has a "
            "sequence of its own of the given length. Tokens/s are of one GPU, by the slowest; memory is that of "
            f"the fullest. A length fits where no GPU allocates more than {MOST:.0%} of {record['limit']:.1f} GiB."
        )
    if "known" in record:
        names, source = "; ".join(record["known"]["settings"]), record["known"]["record"]
        found.append(f"Longest contexts and peaks of these settings are those of {source}: {names}.")
    if record["not_reached"]:
        found.append(f"Not searched: {'; '.join(record['not_reached'])}.")
    if record["cut"]:
        found.append(
            f"After {record['time_limit']:.0f} seconds nothing more was begun: some medians are of fewer steps than "
            f"{record['repeats']}."
        )
    return [line for paragraph in found for line in (paragraph, "")]


def picture(record: dict[str, Any], path: Path) -> None:
    """Peak memory by tokens, one line a setting that ends where its memory does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for row in record["settings"]:
        points = sorted((int(tokens), peak) for tokens, peak in row["peaks"].items())
        line = axes.plot(*zip(*points, strict=True), "-" if row["tiled"] else "--", marker=".", label=row["name"])
        axes.plot(*points[-1], "o", color=line[0].get_color())
    axes.set(xscale="log", xlabel="tokens of one sequence", ylabel="peak of one training step, GiB")
    axes.axhline(record["held"], color="grey", linewidth=0.8, label="held between steps")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def model_of(args: argparse.Namespace) -> str:
    """The model in words."""
    tied = ", tied" if args.tied else ""
    ffn = f"ffn={args.ffn_hidden_size}"
    if args.experts:
        ffn = f"{args.experts} experts of ffn={args.moe_ffn_hidden_size}, top-{args.top_k}"
    heads = f", {args.heads} heads" if args.heads else ""
    return (
        f"{args.layers} layers, h={args.hidden_size}{heads}, {ffn}, {args.query_groups} groups, "
        f"{args.vocabulary} words{tied}; attention: {args.attention}"
    )


def conditions_of(args: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """What was asked for, as records have it. A collective."""
    return {"model": model_of(args), "gpus": ranks.count(), "limit": trainer.limit(), "most": args.sequence}


def record_of(
    args: argparse.Namespace, origin: Origin, trainer: Trainer, cut: bool, known: list[str] | None = None
) -> dict[str, Any]:
    """What was found so far, for JSON. A collective.

    Args:
        known: settings whose longest contexts are an earlier record's.
    """
    searched = [vars(setting) for setting in trainer.found if setting.longest]
    record = {
        "origin": asdict(origin),
        **conditions_of(args, trainer),
        "held": trainer.held / GIB,
        "repeats": args.repeats,
        "time_limit": args.time_limit,
        "cut": cut,
        "not_reached": [setting.name for setting in trainer.found if not setting.longest],
        "settings": [{k: v for k, v in found.items() if k not in ("model", "elsewhere")} for found in searched],
    }
    record |= {"known": {"record": args.known.stem, "settings": known}} if known else {}
    return record | ({"moe_router": gpt.ROUTING} if args.experts else {})


def write(record: dict[str, Any], path: Path) -> str:
    """Write a record and its page, each at once; returns the page."""
    page = markdown(json.loads(json.dumps(record)))
    for file, text in ((path, json.dumps(record, indent=1) + "\n"), (path.with_suffix(".md"), page)):
        whole = file.with_name(f"{file.name}.new")
        whole.write_text(text)
        whole.replace(file)
    return page


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 28, "hidden_size": 3072, "ffn_hidden_size": 8192, "query_groups": 8, "vocabulary": 128256}
    gpt.add_shape(parser, **shape, sequence=2**20, repeats=10)
    parser.add_argument("--expert-parallel", type=positive, default=1, help="GPUs, each with its part of the experts")
    parser.add_argument("--gpu-memory-gib", type=above_zero, help="as on a smaller GPU")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="some of the settings, by name; by default all")
    parser.add_argument(
        "--known",
        type=Path,
        metavar="RECORD.json",
        help="an earlier record of the same model: its longest contexts hold, or are where the search begins",
    )
    parser.add_argument("--time-limit", type=above_zero, metavar="SECONDS", help="no search, no timing starts later")
    parser.add_argument("--results", type=output_folder, default=RESULTS)
    parser.add_argument("--name", default="longest-context")
    args = parser.parse_args(given)
    size = args.expert_parallel
    ranks.check_count(parser, "--expert-parallel", size)
    if size > 1 and (not args.experts or args.experts % size):
        parser.error(f"--expert-parallel {size}: --experts {args.experts} must be a multiple of it")
    if args.known and not args.known.is_file():
        parser.error(f"--known {args.known}: there is no such file")
    if args.sequence < 4 * STEP:
        parser.error(f"--sequence {args.sequence}: the search begins with {4 * STEP}")
    known = [name for name, *_ in settings(bool(args.experts))]
    for name in args.settings or []:
        if name not in known:
            parser.error(f"--settings: there is no {name!r}; of this model there are {', '.join(map(repr, known))}")
    return args


def main() -> None:
    begin = time.monotonic()
    args = arguments()
    with ranks.ending_together():
        run(args, begin)


def run(args: argparse.Namespace, begin: float) -> None:
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    gpt.initialize(args.expert_parallel)
    if args.gpu_memory_gib and ranks.count() == 1:  # several ranks look at their peaks instead of failing
        torch.cuda.set_per_process_memory_fraction(
            args.gpu_memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    trainer = Trainer(args)
    origin = Origin.now(gpt.PACKAGES, machine(several=ranks.count() > 1))
    path = args.results / f"{origin.date}-{args.name}.json"
    known: list[str] = []
    if args.known:
        record = json.loads(args.known.read_text())
        known = take_known(record, conditions_of(args, trainer), origin, trainer.found)
    search: Search

    def save() -> None:
        record = record_of(args, origin, trainer, search.cut, known)
        if ranks.is_first():
            write(record, path)

    search = Search(trainer, args.repeats, save, args.sequence, args.time_limit, begin)
    search.run()
    record = record_of(args, origin, trainer, search.cut, known)
    if ranks.is_first():
        print(write(record, path), flush=True)
        picture(json.loads(path.read_text()), path.with_suffix(".png"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

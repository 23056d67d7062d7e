"""How long a context trains on one GPU, and how fast: every recompute setting of Megatron's, and tiled models.

    python -m benchmarks.longest_context [--layers 28 --hidden-size 3072 ... --tied] [--attention flash] [--name NAME]

One process, one set of parameters: bf16 weights, float32 gradients (``main_grad``), Megatron's optimizer with float32
weights and moments, all on this GPU. A step is forward, backward and optimizer, one sequence a step. First the longest
sequence that fits is sought for each setting, in steps of 1024 tokens. Then, at the longest one of each stock setting,
its tokens a second are measured beside those of the tiled settings that go at least 1.5 times as far.
"""

import argparse
import gc
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpt
from benchmarks.record import RESULTS, Origin, machine

STEP = 1024
GIB = 2**30
#: A tiled setting is an answer to a stock one where it goes this much farther.
FARTHER = 1.5


@dataclass
class Setting:
    """A model, and what was found of it: tokens that fit, peak GiB by tokens, seconds of a step by tokens."""

    name: str
    model: Any
    tiled: bool
    longest: int = 0
    peaks: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def tokens_per_second(self, tokens: int) -> float:
        return tokens / statistics.median(self.seconds[tokens])


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
    yield "tiled: keep 0, full recompute by 2 layers", full(2), {"mlp_keep": 0}


class Trainer:
    """Training steps of any of the models on the parameters of the first."""

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_tiling import TilingConfig, tile
        from megatron_tiling.report import table

        self._args = args
        self.found: list[Setting] = []
        for name, changes, tiling in settings(bool(args.experts)):
            if args.settings and name not in args.settings:
                continue
            model = gpt.build(args, changes)
            if not self.found:
                parameters = dict(model.named_parameters())
            else:
                gpt.share(model, parameters)
            if tiling is not None:
                print(f"{name}:\n{table(tile(model, TilingConfig(**tiling)))}", flush=True)
            self.found.append(Setting(name, model, tiling is not None))
            gc.collect()  # the parameters that it was built with
            torch.cuda.empty_cache()
        first = self.found[0].model
        self._ddp = gpt.with_main_grad(first)
        options = OptimizerConfig(optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0)
        self._optimizer = get_megatron_optimizer(options, [self._ddp])
        self.step(self.found[0], STEP)  # makes the moments
        self.held = torch.cuda.memory_allocated()
        print(f"held between steps: {self.held / GIB:.1f} GiB", flush=True)

    def step(self, setting: Setting, tokens: int) -> float | None:
        """Seconds of one step, or ``None`` where the memory does not suffice."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        fits = False
        torch.cuda.reset_peak_memory_stats()
        inputs = gpt.batch(self._args, tokens)
        try:
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
            torch.cuda.synchronize()
            start.record()
            setting.model(**inputs).mean().backward()
            self._ddp.finish_grad_sync()
            self._optimizer.step()
            stop.record()
            torch.cuda.synchronize()
            fits = True
        except torch.OutOfMemoryError:
            pass
        rotary: Any = type(setting.model.rotary_pos_emb).forward
        rotary.cache_clear()  # keeps a table for every length
        if not fits:
            gc.collect()
            torch.cuda.empty_cache()
            return None
        setting.peaks[tokens] = torch.cuda.max_memory_allocated() / GIB
        return start.elapsed_time(stop) / 1000

    def find_longest(self, setting: Setting) -> None:
        """Peaks grow with a straight line of tokens: walk to where it meets the limit.

        Running out of memory is avoided, since what a failed step leaves behind falsifies the next one.

        Raises:
            RuntimeError: not even 4096 tokens fit.
        """
        limit = self._limit()
        lengths = [length for length in (2 * STEP, 4 * STEP) if self.step(setting, length) is not None]
        if len(lengths) < 2:
            raise RuntimeError(f"{setting.name}: {4 * STEP} tokens do not fit; take a smaller model")
        share = 0.8  # of the way to go: the first line is drawn from afar
        while True:
            *_, before, last = lengths
            slope = (setting.peaks[last] - setting.peaks[before]) / (last - before)
            guess = last + int(share * (limit - setting.peaks[last]) / slope / STEP) * STEP
            if guess <= last:
                break
            if self.step(setting, guess) is None:
                limit -= 0.01 * limit  # memory lies in pieces
                self.step(setting, STEP)  # takes the place of what the failed step has left
            else:
                lengths.append(guess)
                share = 1.0
        setting.longest = last
        self.step(setting, STEP)  # dispatchers of experts hold on to tensors of the last tokens
        print(f"{setting.name}: {last} tokens, {setting.peaks[last]:.1f} GiB", flush=True)

    def _limit(self) -> float:
        """GiB that this process can allocate."""
        free, total = torch.cuda.mem_get_info()
        allowed = (self._args.gpu_memory_gib or total / GIB) * GIB
        return min(allowed, free + torch.cuda.memory_reserved()) / GIB

    def compare(self, tokens: int, rivals: list[Setting], repeats: int) -> None:
        """Seconds of steps of ``tokens`` tokens, interleaved in random order, after a warm-up."""
        for setting in rivals:
            self.step(setting, tokens)
            self.step(setting, STEP)
        order = list(rivals)
        for _ in range(repeats):
            random.shuffle(order)
            for setting in order:
                seconds = self.step(setting, tokens)
                if seconds is not None:
                    setting.seconds.setdefault(tokens, []).append(seconds)
                self.step(setting, STEP)


def measure(trainer: Trainer, repeats: int) -> None:
    for setting in trainer.found:
        trainer.find_longest(setting)
    # The search has seen many sizes: compiled functions of one size each, as a run has them, from here on.
    torch._dynamo.reset()
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    for stock in trainer.found:
        if not stock.tiled:
            answers = [s for s in trainer.found if s.tiled and s.longest >= FARTHER * stock.longest]
            trainer.compare(stock.longest, [stock, *answers], 2)  # which of them is worth the repeats
            answers.sort(key=lambda answer: answer.tokens_per_second(stock.longest), reverse=True)
            for setting in [stock, *answers]:
                setting.seconds[stock.longest] = []
            trainer.compare(stock.longest, [stock, *answers[:2]], repeats)
            for setting in answers[2:]:
                del setting.seconds[stock.longest]
    for setting in trainer.found:
        if setting.longest not in setting.seconds:
            trainer.compare(setting.longest, [setting], 2)


def markdown(record: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in record["settings"]}
    median = {
        name: {int(tokens): statistics.median(seconds) for tokens, seconds in row["seconds"].items() if seconds}
        for name, row in rows.items()
    }
    lines = [
        *Origin(**record["origin"]).head("The longest context that trains on one GPU", record["model"]),
        f"Held between steps: {record['held']:.1f} GiB (bf16 weights, float32 gradients, weights and moments). "
        f"Lengths in steps of {STEP} tokens; the allocator's segments are expandable.", "",
        "| | longest | peak, GiB | tokens/s there |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows.items():
        longest = row["longest"]
        peak = row["peaks"][str(longest)]
        speed = f"{longest / median[name][longest]:.0f}" if longest in median[name] else "not measured"
        lines.append(f"| {name} | {longest} | {peak:.1f} | {speed} |")
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
                f"| {name} | {tokens} | {speed:.0f} | {other} | {farther:.2f} | {tokens / seconds / speed:.3f} |"
            )
        if not answers:
            lines.append(f"| {name} | {tokens} | {speed:.0f} | none goes that far | | |")
    return "\n".join(lines) + "\n"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 28, "hidden_size": 3072, "ffn_hidden_size": 8192, "query_groups": 8, "vocabulary": 128256}
    gpt.add_shape(parser, **shape, sequence=2**20, repeats=10)
    parser.add_argument("--gpu-memory-gib", type=float, help="as on a smaller GPU")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="some of the settings, by name; by default all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="longest-context")
    args = parser.parse_args()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    gpt.initialize()
    if args.gpu_memory_gib:
        torch.cuda.set_per_process_memory_fraction(
            args.gpu_memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    trainer = Trainer(args)
    measure(trainer, args.repeats)
    tied = ", tied" if args.tied else ""
    experts = f", {args.experts} experts of ffn={args.moe_ffn_hidden_size}, top-{args.top_k}" if args.experts else ""
    record = {
        "origin": asdict(Origin.now(gpt.PACKAGES, machine())),
        "model": f"{args.layers} layers, h={args.hidden_size}, ffn={args.ffn_hidden_size}, {args.query_groups} groups, "
        f"{args.vocabulary} words{tied}{experts}; attention: {args.attention}",
        "held": trainer.held / GIB,
        "repeats": args.repeats,
        "settings": [{k: v for k, v in vars(setting).items() if k != "model"} for setting in trainer.found],
    }
    path = args.results / f"{record['origin']['date']}-{args.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    page = markdown(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(page)
    print(page, flush=True)
    picture(record, path.with_suffix(".png"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

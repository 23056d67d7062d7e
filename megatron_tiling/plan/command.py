"""``python -m megatron_tiling plan``: what a training command needs on the fullest GPU, and which settings fit.

Every setting is run on fake tensors as one rank of each pipeline stage that may be the fullest, each in a process of
its own, which leaves this one clean. What the script prints is shown where it fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_tiling.arguments import add_tiling_args
from megatron_tiling.plan import measure, routing
from megatron_tiling.plan.automatic import automatic_flags
from megatron_tiling.plan.clock import CLOCK, GPUS
from megatron_tiling.plan.columns import columns
from megatron_tiling.plan.longest import longest, search
from megatron_tiling.plan.options import parse
from megatron_tiling.plan.picture import draw
from megatron_tiling.plan.processes import in_processes
from megatron_tiling.plan.room import room
from megatron_tiling.plan.run import Run, plan, prepare
from megatron_tiling.plan.tracker import Tracker

GIB, MIB = 2**30, 2**20
TILED = "--use-tiled-linear"
KEEP_NONE = f"{TILED} --tiled-mlp-keep 0"
SMALLEST = f"{TILED} --tile-factor 8 --tiled-mlp-keep 0 --tiled-head-memory-mib 272"
#: Settings that are compared, beside the command's own. Recompute flags are added where the command has none.
TILINGS = ("", f"{TILED} --tiled-linear-modules output", TILED, KEEP_NONE, SMALLEST)
RECOMPUTE_SCORES = "--recompute-granularity selective --recompute-modules core_attn"
RECOMPUTE_LAYERS = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
RECOMPUTE_FLAGS = ("--recompute-granularity", "--recompute-activations")
#: Flags with which any stage may be the fullest.
UNEVEN = {
    "--pipeline-model-parallel-layout",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--moe-layer-freq",
    "--linear-attention-freq",
    "--window-attn-skip-freq",
    "--heterogeneous-layers-config-path",
    "--heterogeneous-layers-config-encoded-json",
}
#: Megatron then takes its optimizers, with the local implementation too. Found out before it is stood in for.
TRANSFORMER_ENGINE_IS_HERE = importlib.util.find_spec("transformer_engine") is not None
#: Tokens of which sequences are multiples, beside what parallelism asks for.
TOKENS = 128


@dataclass(frozen=True, eq=False)
class Setting:
    """Flags to add to a command, and what the script is given with them; ``own``: dense or tiled, the command's."""

    flags: str
    arguments: list[str]
    own: bool = False


@dataclass(frozen=True)
class Plan:
    """The run of a setting on the fullest of those that were looked at, the work of all, the slowest one's time.

    ``untrained`` are trainable parameters of all that no gradient reaches.
    """

    flags: str
    stage: int
    run: Run
    flops: float
    seconds: float
    untrained: int = 0


class Command:
    """A training command: its script, its settings dense and tiled, and the ranks that may be the fullest."""

    def __init__(self, script: str, arguments: list[str], gpus: int | None) -> None:
        tiling = add_tiling_args(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        self.script, (asked, self.arguments) = script, tiling.parse_known_args(arguments)
        self.dense = Setting("", self.arguments, own=True)
        self.tiled = Setting(TILED, [*self.arguments, TILED], own=True)
        if self.arguments != arguments:
            given = arguments if asked.use_tiled_linear else [*arguments, TILED]
            self.tiled = Setting("as given", given, own=True)
        # Of one that asks for it, what the planner is to choose from: flags behind the command's own.
        self.automatic = [
            Setting(flags, [*self.tiled.arguments, *flags.split()], own=True) for flags in automatic_flags(arguments)
        ]
        names = {argument.partition("=")[0] for argument in self.arguments}
        self.recomputes = [""]
        sizes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("tensor-model", "pipeline-model", "context", "expert-model"):
            sizes.add_argument(f"--{name}-parallel-size", type=int, default=1)
        for name in ("seq-length", "max-position-embeddings", "expert-tensor-parallel-size", "num-experts"):
            sizes.add_argument(f"--{name}", type=int, default=0)
        sizes.add_argument("--transformer-impl", default="transformer_engine")
        sizes.add_argument("--attention-backend", default="auto")
        found = sizes.parse_known_args(arguments)[0]
        on_transformer_engine = found.transformer_impl == "transformer_engine"
        self.attention = found.attention_backend if on_transformer_engine else "none"
        self.with_transformer_engine = on_transformer_engine or TRANSFORMER_ENGINE_IS_HERE
        if names.isdisjoint(RECOMPUTE_FLAGS):
            # Kernels of TransformerEngine keep no scores, but for those of its "unfused" backend.
            keeps_scores = not on_transformer_engine or found.attention_backend == "unfused"
            self.recomputes = ["", *[RECOMPUTE_SCORES] * keeps_scores, RECOMPUTE_LAYERS]
        self.tokens, self.positions = found.seq_length, found.max_position_embeddings
        # Tensor parallelism scatters what context parallelism has left, which takes two pieces of each sequence.
        self.multiple = math.lcm(TOKENS, 2 * found.context_parallel_size * found.tensor_model_parallel_size)
        stages = found.pipeline_model_parallel_size
        in_a_stage = found.tensor_model_parallel_size * found.context_parallel_size
        self.has_experts = found.num_experts > 0
        experts = found.expert_model_parallel_size * (
            found.expert_tensor_parallel_size or found.tensor_model_parallel_size
        )
        least = math.lcm(in_a_stage, experts if self.has_experts else 1) * stages
        self.gpus = least if gpus is None else gpus
        if self.gpus < 1 or self.gpus % least:
            raise SystemExit(
                f"megatron_tiling plan: --gpus {self.gpus}: must be a positive multiple of {least}, as the tensor, "
                "context, pipeline and expert parallel sizes ask for"
            )
        apart = in_a_stage if "--use-tp-pp-dp-mapping" in names else self.gpus // stages
        # The first stage holds most micro-batches and the embedding, the last makes the logits.
        looked_at = range(stages) if UNEVEN & names else sorted({0, stages - 1})
        self.ranks = {stage: stage * apart for stage in looked_at}
        self._untrained: int | None = None  # parameters, in the first of its own settings that runs

    @property
    def advice(self) -> str:
        """What else makes a run smaller."""
        kinds = "tensor, pipeline, context or expert" if self.has_experts else "tensor, pipeline or context"
        shard = "" if "--use-distributed-optimizer" in self.arguments else "--use-distributed-optimizer, "
        return f"more {kinds} parallelism, {shard}or a smaller micro-batch"

    def with_flags(self, *flags: str) -> Setting:
        """The command without tiles, and these."""
        joined = " ".join(filter(None, flags))
        return Setting(joined, [*self.arguments, *joined.split()], own=not joined)

    def others(self) -> Iterator[Setting]:
        """What is compared beside the command's own settings."""
        for flags in itertools.product(self.recomputes, TILINGS):
            setting = self.with_flags(*flags)
            if setting.flags not in (self.dense.flags, self.tiled.flags):
                yield setting

    def plan(self, settings: Iterable[Setting], tracker: Tracker, draw: bool = False) -> Iterator[Plan | str]:
        """Of each setting, with its curve if it is to be drawn, or why it does not run as the command's own do."""
        asked = list(settings)
        jobs = [
            functools.partial(plan, tracker, self.script, setting.arguments, self.gpus, rank, draw)
            for setting in asked
            for rank in self.ranks.values()
        ]
        results = iter(in_processes(jobs))
        for setting in asked:
            runs = {stage: next(results) for stage in self.ranks}
            found = {stage: run for stage, run in runs.items() if isinstance(run, Run)}
            if len(found) < len(runs):
                yield next(run for run in runs.values() if isinstance(run, str))
                continue
            fullest = max(found, key=lambda stage: found[stage].peak)
            untrained = sum(run.untrained for run in found.values())
            if setting.own and self._untrained is None:
                self._untrained = untrained
            if (lost := untrained - (self._untrained or 0)) > 0:
                yield f"no gradient reaches {lost} parameters that train otherwise"
                continue
            flops, seconds = sum(run.flops for run in found.values()), max(run.seconds for run in found.values())
            yield Plan(setting.flags, fullest, found[fullest], flops, seconds, untrained)

    def longest(self, tracker: Tracker, limit: float) -> dict[Setting, int | str]:
        """Tokens of the longest sequence that fits into ``limit`` bytes, or why a setting does not run.

        Of the command's own settings, the cheap one that keeps no MLP, recomputed layers, and the smallest.
        """
        failed: dict[Setting, int | str] = {}
        layers = self.recomputes[-1]

        def peaks(asked: Mapping[Setting, int]) -> dict[Setting, float]:
            settings = []
            for setting, tokens in asked.items():
                positions = max(tokens, self.positions)
                length = ["--seq-length", str(tokens), "--max-position-embeddings", str(positions)]
                settings.append(replace(setting, arguments=[*setting.arguments, *length]))
            answers = dict(zip(asked, self.plan(settings, tracker), strict=True))
            failed.update((setting, answer) for setting, answer in answers.items() if isinstance(answer, str))
            return {setting: answer.run.peak for setting, answer in answers.items() if isinstance(answer, Plan)}

        few = (self.with_flags(KEEP_NONE), self.with_flags(layers), self.with_flags(layers, SMALLEST))
        chosen = {setting.flags: setting for setting in (self.dense, self.tiled, *few)}
        searches = {setting: search(limit, self.tokens, self.multiple) for setting in chosen.values()}
        return longest(searches, peaks) | failed

    def tried(self, tracker: Tracker, limit: float) -> list[Plan]:
        """What ``auto`` may be, up to the first that fits into ``limit`` bytes; all of it if none does.

        Raises:
            SystemExit: none of it runs, and why the last does not.
        """
        found: list[Plan] = []
        for settings in itertools.batched(self.automatic, os.cpu_count() or 1):
            for one in self.plan(settings, tracker):
                if isinstance(one, Plan):
                    found.append(one)
                    if one.run.peak <= limit:
                        return found
        if not found:
            raise SystemExit(one)
        return found

    def choose(self, tracker: Tracker, limit: float) -> None:
        """Of what ``auto`` may be, what it is: the tiled setting of a command that asks for it."""
        *_, last = found = self.tried(tracker, limit)
        flags = last.flags if last.run.peak <= limit else min(found, key=lambda one: one.run.peak).flags
        self.tiled = Setting(f"as given, {flags}", [*self.tiled.arguments, *flags.split()], own=True)


def table(plans: Sequence[Plan], names: Sequence[str], reserved: float) -> str:
    """Parts of memory at the peak in MiB, a column for each plan, and ``reserved`` times the peak."""
    parts = dict.fromkeys(part for one in plans for part in one.run.parts)
    order = sorted(parts, key=lambda part: -max(one.run.parts.get(part, 0) for one in plans))
    rows = [["MiB at the peak", *names]]
    rows += [[part, *(f"{one.run.parts.get(part, 0) / MIB:.0f}" for one in plans)] for part in order]
    rows.append(["peak", *(f"{one.run.peak / MIB:.0f}" for one in plans)])
    rows.append(["torch reserves, about", *(f"{reserved * one.run.peak / MIB:.0f}" for one in plans)])
    rows.append(["set by", *(one.run.phase for one in plans)])
    rows.append(["pipeline stage", *(str(one.stage) for one in plans)])
    return columns(rows)


def undominated(plans: Sequence[Plan]) -> list[Plan]:
    """Those with the least work first, without those that another beats or equals in work and peak."""
    best: list[Plan] = []
    least = min((one.flops for one in plans), default=0)
    for one in sorted(plans, key=lambda one: (round(one.flops / least, 3), one.run.peak)):
        if not best or one.run.peak < best[-1].run.peak:
            best.append(one)
    return best


def ranking(plans: Sequence[Plan], dense: Plan, limit: float, advice: str) -> list[str]:
    """Settings that fit, those with the least work first. If none fits, the smallest, and what else there is."""
    best = undominated(plans)
    fitting = [one for one in best if one.run.peak <= limit]
    head = (
        f"of {len(plans)} settings the best that fit, by their matrix products against dense's; in brackets an "
        "estimate of their kernels' time:"
    )
    if not fitting:
        head, fitting = f"none of {len(plans)} settings fits; try {advice}. The smallest:", best[-1:]
    rows = [
        f"  {one.flops / dense.flops:.3f} ({one.seconds / dense.seconds:.2f})  {one.run.peak / GIB:6.1f} GiB"
        f"  {one.flags or 'dense'}  ({one.run.phase})"
        for one in fitting
    ]
    return [head, *rows]


def main(environment: Mapping[str, str] | None = None) -> None:
    """Run the command that ``sys.argv`` holds.

    Args:
        environment: in which measured runs see GPUs, and torch's allocator is set; by default this process's.

    Raises:
        SystemExit: the script, or Megatron, does not take its arguments, with what it said.
    """
    environment = dict(os.environ if environment is None else environment)
    options = parse(sys.argv[2:])
    command = Command(options.script, options.arguments, options.gpus)
    warnings.simplefilter("ignore")  # Megatron's, of packages that are not installed here
    CLOCK.gpu = GPUS[options.gpu or "H100"]
    if options.measure:
        here = measure.machine(command.gpus, environment)
        options.gpu_memory_gib = options.gpu_memory_gib or here.gib
        if options.gpu_memory_gib <= options.outside_gib:
            raise SystemExit(
                f"megatron_tiling plan: --outside-gib {options.outside_gib:g}: must be less than {here.gib:.4g}, "
                "of the GPUs that are here"
            )
        CLOCK.gpu = measure.rates(here, command.gpus, command.attention, environment)
    tracker = prepare(command.with_transformer_engine, options.expert_imbalance, options.script)
    if command.has_experts:
        print(f"experts: {routing.stated():g} times a balanced router's rows on the fullest rank "
              f"({routing.FLAG}), alike for its experts")  # fmt: skip
    left = room(options.gpu_memory_gib, options.outside_gib, environment)
    limit = left.peak * GIB
    if command.automatic:
        command.choose(tracker, limit)
    if options.longest:
        print(f"{left}; the longest sequence that fits, in steps of {command.multiple} tokens:")
        for setting, tokens in command.longest(tracker, limit).items():
            name = setting.flags or "dense"
            print(f"  {tokens:9}  {name}" if isinstance(tokens, int) else f"  left out: {name}: {tokens}")
        return
    plans = _dense_and_tiled(command, tracker, options.picture is not None)
    print(table(list(plans.values()), list(plans), left.reserved), flush=True)
    if untrained := plans["dense"].untrained:
        print(f"no gradient reaches {untrained} trainable parameters: are they in recomputed blocks of frozen inputs?")
    found: dict[str, measure.Measured | measure.Failed] = {}
    if options.measure:
        print()
        settings = {name: one.arguments for name, one in zip(plans, (command.dense, command.tiled), strict=True)}
        found = measure.runs(command.script, settings, command.gpus, environment, options.picture is not None)
        expected = {name: (one.run, int(left.reserved * one.run.peak), one.seconds) for name, one in plans.items()}
        print(measure.comparison(expected, found), flush=True)
    if options.picture:
        measured = {name: one for name, one in found.items() if isinstance(one, measure.Measured)}
        draw(options.picture, {name: one.run for name, one in plans.items()}, limit, measured)
    print(f"\n{left}", end="; ")
    print("\n".join(_compared(command, tracker, list(plans.values()), limit)))
    if failed := [name for name, one in found.items() if isinstance(one, measure.Failed) and not one.phase]:
        raise SystemExit(f"megatron_tiling plan: the measured run failed, see above: {', '.join(failed)}")


def _dense_and_tiled(command: Command, tracker: Tracker, draw: bool) -> dict[str, Plan]:
    """Plans of the command's own settings by their names.

    Raises:
        SystemExit: one of them does not run.
    """
    plans: dict[str, Plan] = {}
    names = {"dense": "dense", "tiled": f"tiled ({command.tiled.flags})"}
    for (kind, name), one in zip(
        names.items(), command.plan([command.dense, command.tiled], tracker, draw), strict=True
    ):
        if isinstance(one, str):
            raise SystemExit(f"{one}\nmegatron_tiling plan: so ends the plan of the command, {kind}")
        plans[name] = one
    return plans


def _compared(command: Command, tracker: Tracker, plans: Sequence[Plan], limit: float) -> list[str]:
    """The list of settings that fit, the command's own ``plans``, dense first, among them."""
    found, failed = list(plans), []
    others = list(command.others())
    for setting, one in zip(others, command.plan(others, tracker), strict=True):
        if isinstance(one, Plan):
            found.append(one)
        else:
            failed.append(f"  not among them: {setting.flags}: {one.splitlines()[-1]}")
    return [*ranking(found, plans[0], limit, command.advice), *failed]

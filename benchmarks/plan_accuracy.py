"""Memory as the planner predicts it beside what was measured on GPUs: records of benchmarks/results, on fake tensors.

    python -m benchmarks.plan_accuracy [--records NAME ...] [--tensor-parallel N] [--lengths 2]

For every candidate of a record that is TransformerEngine's or ours, the model of its command is built again, and the
peak of its second step above what is held between steps compared with the record's. No GPU is used.
"""

import argparse
import functools
import gc
import json
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from benchmarks.arguments import positive
from benchmarks.record import RESULTS

MIB = 2**20
RECORDS = (
    "2026-11-26-whole-model-flash",
    "2026-11-27-whole-model-flash-8-layers",
    "2026-11-27-mlp-te",
    "2026-11-27-mlp-fp8-columns",
    "2026-11-27-experts",
    "2026-11-27-longest-context-3b",
    "2026-11-27-longest-context-3b-full-recompute",
)
#: Name, predicted and measured MiB above what is held, and measured milliseconds, if any.
Row = tuple[str, float, float, float | None]


class Planner:
    """This process stands for one GPU of ``tensor_parallel``. Once a process, before Megatron is imported."""

    def __init__(self, tensor_parallel: int = 1) -> None:
        import logging

        from megatron_tiling.plan import gpu
        from megatron_tiling.plan.clock import CLOCK
        from megatron_tiling.plan.process_groups import fake_process_groups
        from megatron_tiling.plan.tracker import Tracker

        self.clock, self.milliseconds = CLOCK, 0.0
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        self.tracker = Tracker(on_operation=CLOCK.operation)
        gpu.install(self.tracker, with_transformer_engine=True)
        fake_process_groups(tensor_parallel, 0)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        model_parallel_cuda_manual_seed(7)

    def simulation(self) -> AbstractContextManager[Any]:
        from megatron.core.parallel_state import get_global_memory_buffer
        from torch._subclasses.fake_tensor import FakeTensorMode

        from megatron_tiling.tiles.planned_steps import forget_planned_memory

        forget_planned_memory()
        get_global_memory_buffer().buffer.clear()  # of the simulation before
        stack = ExitStack()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(self.tracker)
        return stack

    def peak(self, step: Callable[[], Any]) -> float:
        """MiB of a step above what is held before it."""
        gc.collect()
        held = self.tracker.bytes
        self.tracker.reset_peak()
        self.clock.clear()
        kept = step()
        self.milliseconds = 1000 * self.clock.seconds
        del kept
        return (self.tracker.peak.bytes - held) / MIB


def arguments(record: dict[str, Any], **shape: int) -> argparse.Namespace:
    """Of a model, as the command of a record gives them."""
    from benchmarks import gpt

    parser = argparse.ArgumentParser()
    gpt.add_shape(parser, **shape)
    parser.add_argument("--settings", nargs="+")
    args = parser.parse_known_args(shlex.split(record["origin"]["command"].partition("benchmarks.")[2])[1:])[0]
    args.fp8, args.more, args.tensor_parallel = None, True, record.get("tensor_parallel", 1)
    return args


def built(
    args: argparse.Namespace, changes: dict[str, Any], tiling: dict[str, Any] | None, build: Callable[..., Any]
) -> Any:
    from megatron_tiling import TilingConfig, tile

    model = build(args, changes)
    if tiling is not None:
        tile(model, TilingConfig(**tiling))
    return model


def of_whole_model(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    from benchmarks import gpt, whole_model

    shape = {"layers": 3, "hidden_size": 4096, "ffn_hidden_size": 14336, "query_groups": 8, "vocabulary": 128256}
    args = arguments(record, **shape, sequence=2048, batch=4)
    yield from models(planner, record, args, whole_model.settings(args), gpt.build)


def of_lora(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    """Of frozen models with adapters, of Megatron-Bridge's folder ``peft``."""
    from benchmarks import lora

    shape = {"layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "query_groups": 8, "vocabulary": 128256}
    args = arguments(record, **shape, sequence=2048, batch=4, rank=16)
    yield from models(planner, record, args, lora.settings(args), lora.build)


def models(
    planner: Planner,
    record: dict[str, Any],
    args: argparse.Namespace,
    settings: Iterable[Any],
    build: Callable[..., Any],
) -> Iterator[Row]:
    """Of a record of ``whole_model.save``, which has symmetric memory in its peaks."""
    from benchmarks import gpt
    from megatron_tiling.tiles.planned_steps import planned_memory

    measured = {row["name"]: row["peak_mib"] for row in record["candidates"]}
    times = {row["name"]: statistics.median(row["milliseconds"]) for row in record["candidates"]}
    for name, changes, tiling in settings:
        if name not in measured:
            continue
        with planner.simulation():
            model = built(args, changes, tiling, build)
            ddp = gpt.with_main_grad(model)
            inputs = gpt.batch(args, args.sequence, args.batch)

            def step(model: Any = model, ddp: Any = ddp, inputs: Any = inputs) -> Any:
                ddp.zero_grad_buffer()
                planner.clock.clear()  # was not timed
                loss = model(**inputs).mean()
                loss.backward()
                return loss.detach()

            step()
            symmetric = sum(memory.nbytes for memory in planned_memory()) / MIB
            yield name, planner.peak(step) + symmetric, measured[name], times[name]


def of_mlp(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    for run in record["runs"]:
        with planner.simulation():
            yield from mlps(planner, run, record["tokens"])


def mlps(planner: Planner, run: dict[str, Any], tokens: int) -> Iterator[Row]:
    import torch

    from benchmarks import mlp_measure, te_mlp
    from benchmarks.mlp_candidates import Candidate

    dense = te_mlp.build(*run["shape"])
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(te_mlp.add_to_main_grad)
    hidden = torch.randn(tokens, 1, run["shape"][0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(hidden)
    measured = {row["name"]: row["memory_mib"] for row in run["candidates"]}
    times = {row["name"]: statistics.median(row["milliseconds"]) for row in run["candidates"]}
    for name, function in te_mlp.of_megatron(dense, run["shape"]):
        step = functools.partial(mlp_measure.step, Candidate(name, function, []), hidden, grad_output)
        step()
        hidden.grad = None
        yield f"h={run['shape'][0]}: {name}", planner.peak(step), measured[name], times[name]


def of_mlp_fp8(planner: Planner, record: list[str], lengths: int) -> Iterator[Row]:
    """Of a page, which has no record beside it; not of FP8 parameters, which are not planned."""
    import torch

    from benchmarks import mlp_fp8, mlp_measure
    from benchmarks.mlp_candidates import Candidate
    from megatron_tiling import TilingConfig, tile

    tilings = {mlp_fp8.name_of(*tiling): tiling for tiling in mlp_fp8.TILED}
    shape: list[int] = []
    for line in record:
        if line.startswith("## h="):
            shape = [int(size.partition("=")[2]) for size in line.replace(",", "").split()[1:]]
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 12 or cells[1] not in mlp_fp8.RECIPES or "parameters" in cells[2]:
            continue
        recipe, name, found = cells[1], cells[2], float(cells[8])
        with planner.simulation():
            mlp = mlp_fp8.mlp_of(*shape, fp8="hybrid", fp8_recipe=recipe)
            for layer in mlp.children():
                layer.weight.main_grad = torch.zeros(layer.weight.shape, device="cuda")
            if name in tilings:
                tiles, keep, holds = tilings[name]
                tile(torch.nn.ModuleDict({"mlp": mlp}), TilingConfig(tiles, mlp_keep="all" if keep is None else 0))
                mlp.holds_weights = holds
            run = mlp_fp8.Run(recipe, name, mlp)
            hidden = torch.randn(8192, 1, shape[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn_like(hidden)

            def step(run: Any = run, hidden: Any = hidden, grad: Any = grad) -> None:
                for is_first in (True, False):
                    candidate = Candidate(run.name, run.step(is_first), list(run.mlp.parameters()))
                    mlp_measure.step(candidate, hidden, grad)

            step()
            run.forget()
            yield f"h={shape[0]}, {recipe}: {name}", planner.peak(step), found, None


def of_longest_context(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from benchmarks import context_search, gpt, longest_context

    if record.get("gpus", 1) > 1:
        raise SystemExit(f"{record['origin']['command']}: only records of one GPU are compared")
    shape = {"layers": 28, "hidden_size": 3072, "ffn_hidden_size": 8192, "query_groups": 8, "vocabulary": 128256}
    args = arguments(record, **shape, sequence=2**20)
    measured = {row["name"]: row["peaks"] for row in record["settings"]}
    times = {row["name"]: row["seconds"] for row in record["settings"]}
    for name, changes, tiling in longest_context.settings(bool(args.experts)):
        if name not in measured:
            continue
        with planner.simulation():
            model = built(args, changes, tiling, gpt.build)
            ddp = gpt.with_main_grad(model)
            options = OptimizerConfig(optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0)
            optimizer = get_megatron_optimizer(options, [ddp])

            def step(tokens: int, model: Any = model, ddp: Any = ddp, optimizer: Any = optimizer) -> None:
                inputs = gpt.batch(args, tokens)
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                planner.clock.clear()  # was not timed
                model(**inputs).mean().backward()
                ddp.finish_grad_sync()
                optimizer.step()
                type(model.rotary_pos_emb).forward.cache_clear()

            step(context_search.STEP)
            known = sorted(map(int, measured[name]))
            chosen = {known[round(i * (len(known) - 1) / max(1, lengths - 1))] for i in range(lengths)}
            timed = {int(tokens): 1000 * statistics.median(found) for tokens, found in times[name].items() if found}
            for tokens in sorted(chosen | timed.keys()):
                found = measured[name][str(tokens)] - record["held"]
                if tokens == context_search.STEP and found < 0.01:
                    continue  # of the step that made the moments, which is what is held: after its peak
                yield (
                    f"{name}, {tokens} tokens",
                    planner.peak(functools.partial(step, tokens)),
                    found * 1024,
                    timed.get(tokens),
                )


def of_experts(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    import torch

    for run in record["runs"]:
        counts = torch.tensor(run["rows"])
        with planner.simulation():
            yield from grouped_experts(planner, run, record["hidden_size"], counts)


def grouped_experts(planner: Planner, run: dict[str, Any], hidden_size: int, counts: Any) -> Iterator[Row]:
    """What a step allocates beside its output, of rows that are permuted already, as the record was measured."""
    import torch
    from megatron.core import tensor_parallel

    from benchmarks import experts, gpt
    from megatron_tiling import TilingConfig, tile

    local, _, ffn = map(int, run["case"].split(":"))
    dense = experts.build(hidden_size, local, ffn)
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    rows = sum(run["rows"])
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(rows, device="cuda", requires_grad=True)
    grad_output = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16)

    def through(module: Any) -> Callable[[Any], Any]:
        return lambda hidden: module(hidden, counts, probs)[0]

    def step(function: Callable[[Any], Any]) -> Any:
        hidden.grad = None
        output = function(hidden)
        output.backward(grad_output)
        return output

    stock = through(dense.experts)
    found = {experts.STOCK: stock}
    recomputed = experts.build(hidden_size, local, ffn)
    recomputed.experts.activation_recompute = True
    gpt.share(recomputed, dict(dense.named_parameters()))
    found[f"{experts.STOCK}, recompute moe_act"] = through(recomputed.experts)
    found[f"{experts.STOCK}, recompute moe"] = lambda hidden: tensor_parallel.checkpoint(stock, False, hidden)
    for tiles, keep in experts.OURS:
        model = experts.build(hidden_size, local, ffn)
        gpt.share(model, dict(dense.named_parameters()))
        tile(model, TilingConfig(splits={"experts": (1, tiles)}, mlp_keep=keep))  # type: ignore[arg-type]
        found[f"ours: T={tiles} keep {keep}"] = through(model.experts)
    measured = {row["name"]: row["peak_mib"] for row in run["candidates"]}
    times = {row["name"]: statistics.median(row["milliseconds"]) for row in run["candidates"]}
    for name, function in found.items():
        step(function)
        hidden.grad = None
        peak = planner.peak(functools.partial(step, function)) - grad_output.nbytes / MIB
        yield f"{run['case']}: {name}", peak, measured[name], times[name]


def of_tp_overlap(planner: Planner, record: dict[str, Any], lengths: int) -> Iterator[Row]:
    """Without what moves its bytes by NCCL, and what leaves communication out. Held is symmetric memory, too."""
    for run in record["runs"]:
        with planner.simulation():
            yield from overlapped(planner, run, record)


def overlapped(planner: Planner, run: dict[str, Any], record: dict[str, Any]) -> Iterator[Row]:
    import torch

    from benchmarks import mlp_measure, te_mlp
    from benchmarks.tp_overlap_rows import KINDS as WHAT
    from benchmarks.tp_overlap_rows import rows_of

    (hidden_size, _), tokens = run["shape"], run["tokens"]
    args = argparse.Namespace(sequence=record.get("sequence", tokens), attention=record.get("attention"))
    kind = WHAT[record["what"]](tuple(run["shape"]), tokens, args)
    dense = kind.build()
    for parameter in dense.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(te_mlp.add_to_main_grad)
    rows = tokens // kind.batch // record["tp"]
    hidden = torch.randn(rows, kind.batch, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn_like(hidden)
    measured = {row["name"]: row for row in run["rows"]}
    for row in rows_of(kind, dense, [2, 3, 4], argparse.Namespace(userbuffers=False, fused_ops=False)):
        if row.name not in measured or "NCCL" in row.name or "without" in row.name:
            continue
        step = functools.partial(mlp_measure.step, row.candidate, hidden, grad_output)
        step()
        hidden.grad = None
        found = measured[row.name]
        time = statistics.median(found["milliseconds"])
        yield f"h={hidden_size}, {tokens} tokens: {row.name}", planner.peak(step), found["peak_mib"], time


KINDS: dict[str, Callable[[Planner, Any, int], Iterator[Row]]] = {
    "whole-model": of_whole_model,
    "lora": of_lora,
    "mlp-te": of_mlp,
    "mlp-fp8": of_mlp_fp8,
    "experts": of_experts,
    "longest-context": of_longest_context,
    "tp-overlap": of_tp_overlap,
}


def read(name: str) -> Any:
    """A record, or the lines of a page that has none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else path.with_suffix(".md").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", default=RECORDS, metavar="NAME")
    parser.add_argument("--tensor-parallel", type=positive, default=1, help="of the records")
    parser.add_argument("--lengths", type=positive, default=2, help="of those that a record has of a setting")
    args = parser.parse_args()
    planner = Planner(args.tensor_parallel)
    errors = []
    for name in args.records:
        record = read(name)
        size = record.get("tp", record.get("tensor_parallel", 1)) if isinstance(record, dict) else 1
        if size != args.tensor_parallel:
            raise SystemExit(f"{name} is a record of TP={size}: give --tensor-parallel {size}, and other records apart")
        kind = next(kind for part, kind in KINDS.items() if part in name)
        print(f"\n{name}\n\n| | predicted MiB | measured MiB | error | seconds |\n|---|---|---|---|---|")
        start = time.perf_counter()
        for row, predicted, measured, _ in kind(planner, record, args.lengths):
            errors.append(abs(predicted / measured - 1))
            seconds = time.perf_counter() - start
            print(
                f"| {row} | {predicted:.1f} | {measured:.1f} | {predicted / measured - 1:+.2%} | {seconds:.0f} |",
                flush=True,
            )
            start = time.perf_counter()
    print(f"\n{len(errors)} peaks; error: {statistics.median(errors):.2%} in the median, {max(errors):.2%} at most")


if __name__ == "__main__":
    main()

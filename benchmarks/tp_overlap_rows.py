"""Candidates of ``tp_overlap``: an MLP or a transformer layer, dense, ours and peers, all on one set of weights."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpt, ranks
from benchmarks import tp_overlap_report as report
from benchmarks.mlp_candidates import Candidate

QUERY_GROUPS = 8
WORDS = 1024  # of the embedding that a layer is built with, and that nobody uses
Forward = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """A candidate of this benchmark.

    Args:
        around: is entered while it runs, forward and backward.
        held: bytes that stay between steps besides weights and gradients, or what counts them once it has run.
    """

    name: str
    run: Forward
    around: Callable[[], Any] = contextlib.nullcontext
    held: int | Callable[[], int] = 0
    milliseconds: list[float] = field(default_factory=list)
    host_milliseconds: list[float] = field(default_factory=list)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.name, self.run, [])

    @property
    def held_bytes(self) -> int:
        return self.held() if callable(self.held) else self.held


class MLPs:
    """Megatron's MLP on TransformerEngine's layers, the norm in fc1; this rank's shard."""

    modules: tuple[str, ...] | None = ("fc1", "fc2")

    def __init__(self, shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> None:
        self.shape, self.tokens, self.batch = shape, tokens, 1

    def build(self, **changes: Any) -> Any:
        from megatron.core.extensions import transformer_engine as te
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.mlp import MLP, MLPSubmodules

        config = TransformerConfig(
            num_layers=1, hidden_size=self.shape[0], ffn_hidden_size=self.shape[1],
            num_attention_heads=self.shape[0] // 128, normalization="RMSNorm", params_dtype=torch.bfloat16, bf16=True,
            add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=True,
            gradient_accumulation_fusion=True, tensor_model_parallel_size=dist.get_world_size(),
            sequence_parallel=True, **changes,
        )  # fmt: skip
        submodules = MLPSubmodules(linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
        return torch.nn.ModuleDict({"mlp": MLP(config, submodules, ffn_hidden_size=self.shape[1])}).cuda()

    def forward(self, model: Any) -> Forward:
        return lambda hidden: model.mlp(hidden)[0]


class Layers:
    """A transformer layer as ``gpt.build`` has it, causal, with rotary positions; our default says what is tiled."""

    modules: tuple[str, ...] | None = None

    def __init__(self, shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> None:
        self.shape, self.tokens, self.batch = shape, tokens, tokens // args.sequence
        self.args = argparse.Namespace(
            layers=1, hidden_size=shape[0], ffn_hidden_size=shape[1], query_groups=QUERY_GROUPS, vocabulary=WORDS,
            sequence=args.sequence, experts=0, heads=None, tied=False, attention=args.attention,
        )  # fmt: skip
        self.rotary: Tensor | None = None

    def build(self, **changes: Any) -> Any:
        parallel = {"tensor_model_parallel_size": dist.get_world_size(), "sequence_parallel": True}
        whole = gpt.build(self.args, parallel | changes, head=False)
        if self.rotary is None:
            self.rotary = whole.rotary_pos_emb(self.args.sequence)
        return torch.nn.ModuleDict({"layer": whole.decoder.layers[0]})

    def forward(self, model: Any) -> Forward:
        def run(hidden: Tensor) -> Tensor:
            output: Tensor = model.layer(hidden, attention_mask=None, rotary_pos_emb=self.rotary)[0]
            return output

        return run


#: What ``--what`` names.
KINDS: dict[str, type[MLPs] | type[Layers]] = {"mlp": MLPs, "layer": Layers}


class Still:
    """Stands for what arrives where nothing is sent: random numbers, for products of zeros are faster."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, ...], Tensor] = {}

    def of(self, *shape: int) -> Tensor:
        if shape not in self.memory:
            self.memory[shape] = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return self.memory[shape].detach()  # a tensor of its own: TransformerEngine empties what it has used

    @contextlib.contextmanager
    def in_dense(self) -> Iterator[None]:
        """TransformerEngine's layers send nothing."""
        from transformer_engine.pytorch.module import base, layernorm_linear, linear

        def gathered(shard: Tensor, group: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
            return self.of(shard.shape[0] * group.size(), *shard.shape[1:]), None

        def scattered(whole: Tensor, group: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
            return whole[: whole.shape[0] // group.size()], None

        names = {"gather_along_first_dim": gathered, "reduce_scatter_along_first_dim": scattered}
        with replaced((base, layernorm_linear, linear), names):
            yield

    @contextlib.contextmanager
    def in_steps(self) -> Iterator[None]:
        """Our stepped loops send nothing, and add up what their memory holds; nor does what of a layer is dense."""
        from megatron_tiling.tiles import step_comm

        class StillSteps(step_comm.ScatteredSteps):
            def _exchange(self, sends: Any, receives: Any) -> list[Any]:
                return []

        def start(comm: Any, sources: Any, out: Any, *options: Any, **named: Any) -> Any:
            return StillSteps(comm.group, sources, out)

        with self.in_dense(), replaced(stepped_modules(), {"start_steps": start}):
            yield


def stepped_modules() -> tuple[Any, ...]:
    """Loops over steps that are imported, by the function that begins a pass."""
    tiles = {name: module for name, module in sys.modules.items() if name.startswith("megatron_tiling.tiles.")}
    return tuple(module for module in tiles.values() if hasattr(module, "start_steps"))


@contextlib.contextmanager
def replaced(modules: tuple[Any, ...], functions: dict[str, Any]) -> Iterator[None]:
    stock = [(module, name, getattr(module, name)) for module in modules for name in functions if hasattr(module, name)]
    for module, name, _ in stock:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for module, name, function in stock:
            setattr(module, name, function)


def rows_of(kind: MLPs | Layers, dense: Any, steps: list[int], peers: argparse.Namespace) -> Iterator[Row]:
    """All on the weights of ``dense``. Held besides the peak: symmetric memory, and Megatron's buffer for gathers.

    Args:
        steps: numbers of steps, from few to many.
        peers: ``userbuffers`` and ``fused_ops`` say which of them take part.
    """
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.report import table
    from megatron_tiling.tiles import symmetric

    still = Still()
    yield Row(report.DENSE, kind.forward(dense))
    yield Row(report.DENSE_STILL, kind.forward(dense), still.in_dense)
    if peers.userbuffers:
        yield Row(report.USERBUFFERS, kind.forward(with_userbuffers(kind, dense)))
    if peers.fused_ops and isinstance(kind, MLPs):
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        from benchmarks import tp_overlap_torch

        run = tp_overlap_torch.forward(dense.mlp, get_tensor_model_parallel_group())
        yield Row(report.FUSED_OPS, run, held=tp_overlap_torch.workspace_bytes)

    def ours(factor: int, keep: Any, overlap: int | None = None, transport: str = "auto") -> Forward:
        model = kind.build()
        gpt.share(model, dict(dense.named_parameters()))
        found = tile(model, TilingConfig(factor=factor, modules=kind.modules, mlp_keep=keep, tp_overlap=overlap))
        ranks.say(table(found))
        for module in model.modules():
            if hasattr(module, "transport"):
                module.transport = transport
        return kind.forward(model)

    whole = kind.tokens * kind.shape[0] * 2
    areas = symmetric.SOURCES * whole // dist.get_world_size() + whole
    alone = isinstance(kind, MLPs)
    yield Row(report.OURS, ours(1, "all"), held=whole)
    if alone:
        yield Row("ours, 4 tiles", ours(4, "all"), held=whole)
    for count in steps:
        yield Row(f"ours, {count} steps", ours(1, "all", count), held=whole + areas)
    four = 4 if 4 in steps else steps[-1]
    yield Row(f"ours, {four} steps, keep 0", ours(1, 0, four), held=areas)
    if alone:
        yield Row("ours, 4 tiles, keep 0", ours(4, 0), held=whole)
    for count in steps[1:3]:
        yield Row(f"ours, {count} steps, by NCCL", ours(1, "all", count, "collectives"), held=whole)
    for count in steps[1:3]:
        name = f"ours, {count} steps, without communication"
        yield Row(name, ours(1, "all", count, "collectives"), still.in_steps)


def with_userbuffers(kind: MLPs | Layers, dense: Any) -> Any:
    """TransformerEngine's own overlap, without multicast; its buffers are of one shape in a process."""
    from transformer_engine.pytorch.module import base

    os.environ.setdefault("UB_SKIPMC", "1")
    modes = [base.UserBufferQuantizationMode.NONE]
    world = dist.get_world_size()
    base.initialize_ub([kind.tokens, kind.shape[0]], world, quantization_modes=modes, bootstrap_backend="nccl")
    model = kind.build(tp_comm_overlap=True)
    gpt.share(model, dict(dense.named_parameters()))
    return model

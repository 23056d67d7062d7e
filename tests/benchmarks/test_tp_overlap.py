"""Candidates of ``benchmarks/tp_overlap.py``: what is silenced, torch's fused ops, and what cannot be asked for."""

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import tp_overlap
from benchmarks.tp_overlap_rows import Still
from megatron_tiling.tiles import step_comm, stepped_mlp
from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.comm import ColumnComm
from tests.support.launch import torchrun

RANKS = 4


class Group:
    """Of ranks that nobody runs: what is sent to them is an error."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return RANKS


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """TransformerEngine's modules that communicate."""
    parents = "transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"
    modules: dict[str, Any] = {name: ModuleType(name) for name in parents}
    for name in ("base", "layernorm_linear", "linear"):
        module: Any = ModuleType(name)
        module.gather_along_first_dim = "stock"
        modules[f"{parents[-1]}.{name}"] = module
        setattr(modules[parents[-1]], name, module)
    modules[f"{parents[-1]}.linear"].reduce_scatter_along_first_dim = "stock"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**{name: modules[f"{parents[-1]}.{name}"] for name in ("base", "linear")})


def test_every_stepped_loop_is_silenced(engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = ModuleType("stepped_other")
    other.start_steps = step_comm.start_steps
    monkeypatch.setitem(sys.modules, "megatron_tiling.tiles.stepped_other", other)
    loops = (other, stepped_mlp)
    with Still().in_steps():
        assert all(loop.start_steps is not step_comm.ScatteredSteps for loop in loops)
        assert other.start_steps is stepped_mlp.start_steps
        assert "megatron_tiling" not in other.start_steps.__module__
        assert engine.linear.reduce_scatter_along_first_dim != "stock" != engine.base.gather_along_first_dim
    assert all(loop.start_steps.__module__ == "megatron_tiling.tiles.step_comm" for loop in loops)
    assert (engine.linear.reduce_scatter_along_first_dim, engine.base.gather_along_first_dim) == ("stock", "stock")


@pytest.mark.parametrize("keeps", [True, False])
def test_steps_without_communication(engine: SimpleNamespace, keeps: bool) -> None:
    def memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    group: Any = Group()
    loop = stepped_mlp.SteppedLoop(
        activation=Activation(False, lambda pre, bias, scale: F.silu(pre)),
        steps=3,
        keeps=keeps,
        comm=ColumnComm(group, sequence_parallel=True, allreduce_dgrad=False, gather_buffer=memory),
    )
    hidden, fc1, fc2 = (torch.randn(*shape, requires_grad=True) for shape in ((512, 1, 8), (16, 8), (8, 16)))
    with Still().in_steps():
        output = stepped_mlp.stepped_mlp(hidden, fc1, None, fc2, loop)
        output.backward(torch.randn_like(output))
    assert output.shape == hidden.shape
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in (hidden, fc1, fc2))


def test_fused_ops_compute_the_mlp() -> None:
    output = torchrun("-m", "tests.benchmarks.check_tp_overlap_torch", world=2)
    assert output.count("fused ops hold") == 2, output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--what layer --fused-ops", "--fused-ops: not with --what layer"),
        ("--what layer --tokens 8192 12288", "--tokens 12288: must be a multiple of --sequence 8192"),
        ("--userbuffers", "--userbuffers takes one size and one number of tokens: its buffers are of one shape"),
        ("--steps 1", "argument --steps: 1 is too small: give 2 or more"),
        ("--what head", "argument --what: invalid choice: 'head'"),
    ],
)
def test_options_that_cannot_be(options: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tp_overlap.arguments(options.split())
    assert complaint in capsys.readouterr().err


def test_sequences_are_a_layers_alone() -> None:
    assert tp_overlap.arguments("--tokens 12288".split()).what == "mlp"
    layer = tp_overlap.arguments("--what layer --tokens 8192 16384 --sequence 4096".split())
    assert (layer.sequence, layer.attention, layer.steps) == (4096, "flash", [2, 3, 4, 6])

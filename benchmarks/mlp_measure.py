"""Time, memory, kernels and errors of candidates, interleaved in random order in one process."""

import contextlib
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mlp_candidates import Candidate
from megatron_tiling.tiles.activation import Activation, Formula

MIB = 2**20
HEAD_START = 2_000_000  # GPU cycles of waiting, in which the CPU runs ahead: launch latency is no one's time
STEPS = 2  # of a candidate, one after the other, in each of its runs


@dataclass
class Measurement:
    name: str
    milliseconds: list[float] = field(default_factory=list)
    memory_mib: float = 0.0
    memory_with_main_grad_mib: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def step(candidate: Candidate, hidden: Tensor, grad_output: Tensor) -> Tensor:
    for parameter in candidate.parameters:
        parameter.grad = None
    hidden.grad = None
    output = candidate.run(hidden)
    output.backward(grad_output)
    return output


def measure(
    candidates: list[Candidate], hidden: Tensor, grad_output: Tensor, repeats: int, profiled: set[str]
) -> list[Measurement]:
    """Every candidate ``repeats`` times. Dense warms up first, so that its kernels are compiled for its shape."""
    results = {candidate.name: Measurement(candidate.name) for candidate in candidates}
    for candidate in candidates:
        for _ in range(3):
            step(candidate, hidden, grad_output)
    for candidate in candidates:
        results[candidate.name].memory_mib = peak_memory(candidate, hidden, grad_output)
        with main_grads(candidate):
            results[candidate.name].memory_with_main_grad_mib = peak_memory(candidate, hidden, grad_output, held=True)
    return _timed(results, candidates, hidden, grad_output, repeats, profiled)


def measure_held(
    candidates: list[Candidate], hidden: Tensor, grad_output: Tensor, repeats: int, profiled: set[str]
) -> list[Measurement]:
    """As ``measure``, where weight gradients are held all the time, and so not counted."""
    results = {candidate.name: Measurement(candidate.name) for candidate in candidates}
    for candidate in candidates:
        for _ in range(3):
            step(candidate, hidden, grad_output)
        results[candidate.name].memory_with_main_grad_mib = peak_memory(candidate, hidden, grad_output, held=True)
    return _timed(results, candidates, hidden, grad_output, repeats, profiled)


def _timed(
    results: dict[str, Measurement],
    candidates: list[Candidate],
    hidden: Tensor,
    grad_output: Tensor,
    repeats: int,
    profiled: set[str],
) -> list[Measurement]:
    """Times, in random order, and kernels."""
    order = list(candidates)
    for _ in range(repeats):
        random.shuffle(order)
        for candidate in order:
            results[candidate.name].milliseconds.append(time_once(candidate, hidden, grad_output))
    for candidate in candidates:
        if candidate.name in profiled:
            results[candidate.name].kernels = kernel_table(candidate, hidden, grad_output)
    return list(results.values())


def time_once(candidate: Candidate, hidden: Tensor, grad_output: Tensor, head_start: int = HEAD_START) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(head_start)
    start.record()
    for _ in range(STEPS):
        step(candidate, hidden, grad_output)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / STEPS


def peak_memory(candidate: Candidate, hidden: Tensor, grad_output: Tensor, held: bool = False) -> float:
    """MiB at the peak beyond weights, input, output gradient, and the weight gradients, unless those are ``held``."""
    for parameter in candidate.parameters:
        parameter.grad = None
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(candidate, hidden, grad_output)
    torch.cuda.synchronize()
    gradients = 0 if held else sum(parameter.nbytes for parameter in candidate.parameters)
    return (torch.cuda.max_memory_allocated() - before - gradients) / MIB


@contextlib.contextmanager
def main_grads(candidate: Candidate) -> Iterator[None]:
    """Weight gradients go where Megatron's DDP holds them all the time: fused by our layers, added by a hook else."""

    def add(parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

    for parameter in candidate.parameters:
        parameter.main_grad = torch.zeros_like(parameter)
    handles = [parameter.register_post_accumulate_grad_hook(add) for parameter in candidate.parameters]
    for layer in candidate.layers:
        layer.gradient_accumulation_fusion = True
    yield
    for layer in candidate.layers:
        layer.gradient_accumulation_fusion = False
    for handle in handles:
        handle.remove()
    for parameter in candidate.parameters:
        del parameter.main_grad


def kernel_table(candidate: Candidate, hidden: Tensor, grad_output: Tensor) -> list[tuple[str, int, float]]:
    """``(kernel, calls, milliseconds)`` of one step, longest first."""
    steps = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step(candidate, hidden, grad_output)
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count // steps, event.device_time_total / 1000 / steps) for event in profiler.key_averages()
    ]
    return sorted((row for row in rows if row[2] > 0.005), key=lambda row: -row[2])


def reference(hidden: Tensor, fc1: Tensor, fc2: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, fc1, fc2)]
    gate, up = F.linear(leaves[0], leaves[1]).chunk(2, -1)
    output = F.linear(F.silu(gate) * up, leaves[2])
    grads = torch.autograd.grad(output, leaves, grad_output.double())
    return dict(zip(("output", "hidden", "fc1", "fc2"), (output.detach(), *grads), strict=True))


def errors(candidate: Candidate, hidden: Tensor, grad_output: Tensor, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS errors of a candidate whose parameters are fc1's and fc2's weights."""
    output = step(candidate, hidden, grad_output).detach()
    fc1, fc2 = (parameter.grad for parameter in candidate.parameters)
    found = {"output": output, "hidden": hidden.grad, "fc1": fc1, "fc2": fc2}
    return {name: float((found[name].double() - exact).norm() / exact.norm()) for name, exact in expected.items()}


def activation_bandwidths(tokens: int, ffn_hidden_size: int) -> list[tuple[str, int, float, float]]:
    """``(activation, features, TB/s forward, TB/s backward)`` on column tiles of a whole pre-activation."""
    cases = [
        ("SwiGLU", "silu", True, False),
        ("GeGLU, bias", "gelu_tanh", True, True),
        ("GELU, bias", "gelu_tanh", False, True),
    ]
    rows = []
    copied = torch.empty(tokens, ffn_hidden_size, device="cuda", dtype=torch.bfloat16)
    rate = 2 * copied.nbytes / seconds(lambda: torch.empty_like(copied).copy_(copied)) / 1e12
    rows.append(("copy", ffn_hidden_size, rate, rate))
    for name, kind, gated, bias in cases:
        halves = 1 + gated
        activation = Activation(gated, function=None, formula=Formula(kind))
        whole = torch.randn(tokens, halves, ffn_hidden_size, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
        biases = torch.randn(halves, ffn_hidden_size, device="cuda", dtype=torch.bfloat16) if bias else None
        for width in (ffn_hidden_size, ffn_hidden_size // 4, ffn_hidden_size // 8, ffn_hidden_size // 3):
            tile = slice(ffn_hidden_size - width, ffn_hidden_size)
            pre, grad = whole[:, :, tile], torch.randn_like(copied[:, :width])
            operands = None if biases is None else biases[:, tile], None, grad
            forward = seconds(partial(activation.forward, [pre], *operands))
            backward = seconds(partial(activation.backward, pre, *operands, bias_grad=bias, scale_grad=False))
            moved = grad.nbytes * (halves + 1)
            rows.append((name, width, moved / forward / 1e12, 2 * moved / backward / 1e12))
    return rows


def seconds(run: Callable[[], object]) -> float:
    """Median of ten."""
    times = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times[2:])

"""How long kernels run on a GPU: each is bound by its products, or by the bytes that it reads and writes.

A sum of kernels, one after the other. Neither the host is in it, nor collectives that run beside products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
#: Tiles of results that cuBLAS's kernels for Hopper make, a wave of them at a time (names in the tables of mlp-te).
_GEMM_TILES = ((256, 128), (128, 256), (192, 192), (320, 128), (128, 320), (128, 128))
_FREE = frozenset("_unsafe_view empty empty_like empty_strided lift_fresh new_empty new_empty_strided".split())
_WRITES_FIRST = frozenset(("copy_", "fill_", "zero_"))  # and read not what they return


@dataclass(frozen=True)
class Gpu:
    """Rates of a kind of GPU.

    Args:
        processors: streaming multiprocessors, of which each makes one tile of a product at a time.
        products: FLOP/s of bf16 products whose tiles fill all of them.
        product_traffic: the share of a product's bytes that is not hidden behind it.
        bandwidth: bytes/s of kernels that do little else than read and write.
        attention, attention_backward: FLOP/s, of queries that see a great many keys.
        link: bytes/s between GPUs.
    """

    processors: int
    products: float
    product_traffic: float
    bandwidth: float
    attention: float
    attention_backward: float
    link: float


#: Products and bandwidth of the H100: kernels of TransformerEngine's MLP, h=4096 (benchmarks/results/
#: 2026-11-27-mlp-te.json: its "TransformerEngine"); of the H200: fitted to steps of GPTs of 3 and 8 layers, slower
#: than a kernel alone (2026-11-27-whole-model-h200.json, -8-layers.json). Attention: flash-attn-4 on an H200, of 2048
#: tokens in the former, and of 16384 by a script that was not kept. Links: assumed.
H100 = Gpu(132, 820e12, 0.45, 2.75e12, 860e12, 690e12, 300e9)
H200 = Gpu(132, 700e12, 0.45, 3.9e12, 860e12, 690e12, 300e9)
GPUS = {"H100": H100, "H200": H200}
#: Keys that a query sees where attention has half of its rate.
FEW_KEYS = 730


def shipped_rates(name: str) -> Gpu:
    """Of the kind whose name is in a device's; else the H100's."""
    return next((gpu for kind, gpu in GPUS.items() if kind in name), H100)


class Clock:
    """Seconds that kernels of a step take, and FLOPs of its matrix products."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.clear()

    def clear(self) -> None:
        self.seconds = self.once = self.flops = 0.0

    @contextmanager
    def once_a_step(self) -> Iterator[None]:
        """What runs in it does not run for each micro-batch."""
        begin = self.seconds
        yield
        self.once += self.seconds - begin

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One of torch's."""
        if func._overloadpacket in PRODUCTS:
            self._product(func, args, kwargs, result)
        elif func.namespace == "c10d":
            if any(argument is False for argument in args):  # else asynchronous: it runs beside products
                others = 1 - 1 / max(_ranks(argument) for argument in args)
                sent = max(map(_bytes, ([tensor] for tensor in tree_iter(args))))
                self.seconds += sent * others * (2 if "allreduce" in func._opname else 1) / self.gpu.link
        elif not (func.is_view or func._opname in _FREE or func.namespace != "aten"):
            self.touch(args, kwargs, () if func._opname in _WRITES_FIRST else result)

    def touch(self, *values: Any) -> None:
        """A kernel that reads or writes each tensor of these once."""
        self.seconds += _bytes(values) / self.gpu.bandwidth

    def attend(self, products: int, query: Tensor, keys: float) -> None:
        """Two products of attention forward or five backward, beside what it touches.

        Args:
            query: ``[b, s, heads, d]``, in any order.
            keys: that a query sees, on average: of all, half under a causal mask.
        """
        flops = 2.0 * products * query.numel() * keys
        self.flops += flops
        rate = self.gpu.attention if products == 2 else self.gpu.attention_backward
        self.seconds += flops * (1 + FEW_KEYS / keys) / rate

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        operands = [argument for argument in args if isinstance(argument, Tensor)]
        flops = float(flop_registry[func._overloadpacket](*operands, out_val=result))
        self.flops += flops
        rows, columns = result.shape[-2:]
        batch = result.numel() // max(rows * columns, 1)
        share = useful_share(rows, columns, batch, self.gpu.processors)
        if flops:
            traffic = _bytes((operands, result)) / self.gpu.bandwidth
            self.seconds += max(flops / (share * self.gpu.products) + self.gpu.product_traffic * traffic, traffic)


def useful_share(rows: int, columns: int, batch: int, processors: int) -> float:
    """Of processors' time in products of so many results: what tiles past the edges and the last wave leave."""
    waves = min(
        math.ceil(batch * math.ceil(rows / height) * math.ceil(columns / width) / processors) * height * width
        for height, width in _GEMM_TILES
    )
    return batch * rows * columns / max(waves * processors, 1)


def _ranks(argument: Any) -> int:
    """Of a process group, as operations get it; 1 of what is none."""
    if not isinstance(argument, torch.ScriptObject) or "ProcessGroup" not in argument._type().qualified_name():
        return 1
    return torch.distributed.ProcessGroup.unbox(argument).size()


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in tree_iter(values) if isinstance(value, Tensor))


#: Of this process, which plans one run.
CLOCK = Clock(H100)

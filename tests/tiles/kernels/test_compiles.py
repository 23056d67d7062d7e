"""Every kernel compiles for a Hopper GPU, down to its machine code, which takes no GPU."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

Case = tuple[Any, dict[str, Any], dict[str, Any]]


def softmax_cases() -> Iterator[Case]:
    """Kernels, types of their arguments, and compile-time values; what is None is left out at compile time."""
    from megatron_tiling.tiles.kernels import softmax

    for dtype, capped, chosen, optional in itertools.product(("bf16", "fp32"), (False, True), (1, 3), (False, True)):
        tile = {"products_ptr": f"*{dtype}", "columns_ptr": "*i64", "row_stride": "i32", "width": "i32"}
        types = tile | {"first_column": "i32", "argmax_ptr": "*i64", "out_ptr": f"*{dtype}", "out_stride": "i32"}
        common = {"CHOSEN": chosen, "CAPPED": capped, "BLOCK": 4096}
        nothing = {} if optional else {"weighted_ptr": None, "argmax_ptr": None}
        for whole, rest in ((3, True), (0, True), (3, False)):  # blocks of a row
            blocks = {"CHOSEN_BLOCK": 4, "BLOCKS": whole, "REST": rest}
            yield softmax._update_statistics, types, common | blocks | nothing
        nothing = {} if optional else {"of_entropy_ptr": None, "entropy_ptr": None}
        yield softmax._logits_to_gradient, types, common | nothing


def activation_cases() -> Iterator[Case]:
    from megatron_tiling.tiles.kernels import activation

    numbers = (
        "rows",
        "columns",
        "half_stride",
        "row_stride",
        "bias_half_stride",
        "out_stride",
        "grad_stride",
        "fp8_stride",
    )
    types: dict[str, Any] = dict.fromkeys(numbers, "i32") | {"clamp": "fp32", "linear_offset": "fp32"}
    types |= {name: "*bf16" for name in ("pre", "bias", "scale", "out", "grad")}
    types |= {"bias_sums": "*fp32", "scale_sums": "*fp32", "amax": "*fp32", "fp8": "*fp8e4nv", "fp8_scale": "*fp32"}
    types["parts"] = (("*bf16", "i32", "i32", "i32", "i32"),) * 3
    kinds = ("silu", "quick_gelu", "gelu_tanh", "gelu", "relu", "squared_relu")
    for kind, gated, extras in itertools.product(kinds, (False, True), (False, True)):
        flags = dict.fromkeys(("BIAS", "SCALE", "CLAMP", "BIAS_SUMS", "SCALE_SUMS", "AMAX"), extras)
        values = flags | {"FP8": 448.0 * extras, "KIND": kind, "GATED": gated, "ROWS": 16, "COLUMNS": 128}
        for kernel in (activation._forward_kernel, activation._backward_kernel):
            yield kernel, types, {name: value for name, value in values.items() if name in kernel.arg_names}


def cast_cases() -> Iterator[Case]:
    from megatron_tiling.tiles.kernels import cast

    types = {
        "parts": (("*bf16", "i32", "i32"),) * 2,
        "scale": "*fp32",
        "stride": "i32",
        "all_rows": "i32",
        "columns": "i32",
    }
    types |= {"into_rows": "*fp8e4nv", "into_columns": "*fp8e4nv"}
    for rows, columns in ((True, False), (False, True), (True, True)):
        nothing = {name: None for name, made in (("into_rows", rows), ("into_columns", columns)) if not made}
        yield cast._cast_kernel, types, nothing | {"LARGEST": 448.0, "ROWS": rows, "COLUMNS": columns, "BLOCK": 64}


def add_cases() -> Iterator[Case]:
    from megatron_tiling.tiles.kernels import add

    for dtype, ranks in itertools.product(("bf16", "fp32"), (2, 8)):
        types = {"pieces": f"*{dtype}", "out": f"*{dtype}", "size": "i64"}
        yield add._add_kernel, types, {"RANKS": ranks, "BLOCK": 2048}


def compile_all() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, types, values in itertools.chain(softmax_cases(), activation_cases(), cast_cases(), add_cases()):
        signature = {n: "constexpr" if n in values else types.get(n, default_type(n)) for n in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def default_type(name: str) -> str:
    return "*fp32" if name.endswith("_ptr") else "fp32"


def test_kernels_compile_for_hopper() -> None:
    """In a process of its own: other tests run the kernels in Triton's interpreter."""
    command = [sys.executable, "-m", "tests.tiles.kernels.test_compiles"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


if __name__ == "__main__":
    compile_all()

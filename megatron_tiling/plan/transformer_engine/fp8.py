"""What the planner's TransformerEngine has of FP8, in layouts of Hopper: recipes, quantizers, quantized tensors.

Quantized tensors (tensor/storage/) hold bytes ``[n, k]`` of their rows, ``[k, n]`` of their columns, or both, and
float32 scales: one of a tensor, or of each 128 numbers (1D blocks: inputs, gradients), or 128 x 128 (2D: weights).
"""

import contextlib
import copy
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.transformer_engine.kernels import workspace
from megatron_tiling.plan.transformer_engine.refused import refusal
from megatron_tiling.tiles.gemm import gemm_into

_BLOCK = 128
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
Format = enum.Enum("Format", {"E4M3": ("e4m3", "e4m3"), "HYBRID": ("e4m3", "e5m2")})


class Recipe:
    """How tensors are scaled (common/recipe/)."""

    backward_override = None

    def __init__(self, fp8_format: Any = Format.HYBRID, fp8_dpa: bool = False, **options: Any) -> None:
        if fp8_dpa:
            raise refusal("attention in FP8", "leave out --fp8-dot-product-attention")
        self.fp8_format = fp8_format

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        return isinstance(self, Float8BlockScaling)

    def mxfp8(self) -> bool:
        return False

    def quantizers(self, device: Any) -> dict[str, list["Quantizer"]]:
        """Of a layer: its input, its weight; the gradient of its output."""
        forward, backward = self.fp8_format.value
        if self.float8_block_scaling():
            return {
                "scaling_fwd": [Float8BlockQuantizer(forward, 1), Float8BlockQuantizer(forward, 2)],
                "scaling_bwd": [Float8BlockQuantizer(backward, 1)],
            }

        def one(dtype: str) -> Quantizer:
            kind: Any = Float8Quantizer if self.delayed() else Float8CurrentScalingQuantizer
            found: Quantizer = kind(*(torch.zeros(1, dtype=torch.float32, device=device) for _ in range(2)), dtype)
            return found

        return {"scaling_fwd": [one(forward), one(forward)], "scaling_bwd": [one(backward)]}


class DelayedScaling(Recipe):
    """By the largest values of steps before."""


class Float8CurrentScaling(Recipe):
    """By a tensor's own largest value."""


class Float8BlockScaling(Recipe):
    """By those of blocks."""


class FP8GlobalStateManager:
    """Whether FP8 is on (quantization.py)."""

    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe

    @staticmethod
    def fp8_graph_capturing() -> bool:
        return False

    is_fp8_calibration = fp8_graph_capturing

    @staticmethod
    def reduce_and_update_fp8_tensors(forward: bool = True) -> None:
        """Of delayed scaling, whose histories are a few numbers a layer."""


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, **options: Any) -> Iterator[None]:
    """FP8 is on, by this recipe."""
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def fp8_model_init(enabled: bool = False, **options: Any) -> Any:
    """Parameters in FP8."""
    if enabled:
        raise refusal("parameters in FP8", "leave out --fp8-param-gather")
    return contextlib.nullcontext()


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **options: Any,
) -> Any:
    """Of FP8 layers (distributed.py). Keeps what Megatron's does, for layers that are not."""
    from megatron.core.tensor_parallel.random import checkpoint as checkpoint_of_megatron

    recipe = FP8GlobalStateManager.get_fp8_recipe()

    def run(*tensors: Any) -> Any:
        with fp8_autocast(recipe is not None, recipe):
            return function(*tensors, **options)

    return checkpoint_of_megatron(run, distribute_saved_activations, *args)


class QuantizedTensorStorage:
    """Memory of one tensor: attributes named in ``parts``, rows before columns, or ``None``."""

    parts: tuple[str, ...]

    def prepare_for_saving(self) -> list[Tensor | None]:
        """Its memory, which it gives up."""
        tensors = [getattr(self, name) for name in self.parts]
        self.clear()
        return tensors

    def clear(self) -> None:
        vars(self).update(dict.fromkeys(self.parts))

    def size(self) -> torch.Size:
        """``[n, k]``."""
        rows, columns = getattr(self, self.parts[0]), getattr(self, self.parts[1])
        return rows.size() if rows is not None else torch.Size((columns.shape[-1], *columns.shape[:-1]))


class Float8TensorStorage(QuantizedTensorStorage):
    """Of one scale."""

    parts = "_data", "_transpose", "_scale_inv"

    def __init__(
        self,
        data: Tensor | None = None,
        data_transpose: Tensor | None = None,
        fp8_scale_inv: Any = None,
        fp8_dtype: Any = None,
        fake_dtype: Any = None,
    ) -> None:
        self._data, self._transpose, self._scale_inv = data, data_transpose, fp8_scale_inv
        self._fp8_dtype, self._dtype = fp8_dtype, fake_dtype

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Makes columns of rows; drops what is not wanted."""
        if columnwise_usage and self._transpose is None:
            assert self._data is not None
            self._transpose = self._data.new_empty(self._data.shape[-1], self._data.numel() // self._data.shape[-1])
        if rowwise_usage is False:
            self._data = None
        if columnwise_usage is False:
            self._transpose = None


class Float8BlockwiseQTensorStorage(QuantizedTensorStorage):
    """Of a scale a block."""

    parts = "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv", "_columnwise_scale_inv"

    def __init__(
        self,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        fp8_dtype: Any,
        quantizer: Any,
        is_2D_scaled: bool,
        fake_dtype: Any = None,
    ) -> None:
        self._rowwise_data, self._rowwise_scale_inv = rowwise_data, rowwise_scale_inv
        self._columnwise_data, self._columnwise_scale_inv = columnwise_data, columnwise_scale_inv
        self._fp8_dtype, self._quantizer, self._is_2D_scaled, self._dtype = (
            fp8_dtype, quantizer, is_2D_scaled, fake_dtype,
        )  # fmt: skip

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Makes columns of rows in 2D blocks; drops what is not wanted."""
        if columnwise_usage and self._columnwise_data is None:
            assert self._is_2D_scaled and self._rowwise_data is not None and self._rowwise_scale_inv is not None
            self._columnwise_data = self._rowwise_data.new_empty(self._rowwise_data.shape[::-1])
            scales = self._quantizer.scale_shape(self._rowwise_data.shape, columnwise=True)
            self._columnwise_scale_inv = self._rowwise_scale_inv.new_empty(scales)
        if rowwise_usage is False:
            self._rowwise_data = self._rowwise_scale_inv = None
        if columnwise_usage is False:
            self._columnwise_data = self._columnwise_scale_inv = None


class Quantizer:
    """Makes quantized tensors, with rows, columns or both, as ``set_usage`` has said."""

    internal = with_amax_reduction = force_pow_2_scales = False
    amax_epsilon = 0.0
    rowwise_usage = columnwise_usage = True

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = self.columnwise_usage if columnwise is None else columnwise

    def copy(self) -> Any:
        return copy.copy(self)

    def __call__(self, tensor: Tensor) -> Any:
        CLOCK.touch(tensor)
        return self.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def supports_only_rowwise_all_gather(self) -> bool:
        return True

    def make_empty(self, shape: Sequence[int], *, dtype: Any = None, device: Any = None) -> Any:
        """One per tensor."""
        rows = torch.empty(*shape, dtype=torch.uint8, device=device) if self.rowwise_usage else None
        columns = _columns(shape, device) if self.columnwise_usage else None
        inverse = torch.empty(1, dtype=torch.float32, device=device)
        return Float8TensorStorage(rows, columns, inverse, self.dtype, dtype)


def _columns(shape: Sequence[int], device: Any) -> Tensor:
    return torch.empty(shape[-1], math.prod(shape[:-1]), dtype=torch.uint8, device=device)


class Float8Quantizer(Quantizer):
    """Of a scale that is known before."""

    def __init__(self, scale: Tensor, amax: Tensor, fp8_dtype: str) -> None:
        super().__init__(fp8_dtype)
        self.scale, self.amax = scale, amax


class Float8CurrentScalingQuantizer(Float8Quantizer):
    """Of the tensor's own scale."""


class Float8BlockQuantizer(Quantizer):
    """Of scales of blocks."""

    def __init__(self, dtype: str, block_scaling_dim: int) -> None:
        super().__init__(dtype)
        self.block_scaling_dim = block_scaling_dim

    def supports_only_rowwise_all_gather(self) -> bool:
        return False

    def scale_shape(self, shape: Sequence[int], columnwise: bool) -> tuple[int, int]:
        """Padded to multiples of 4."""
        sizes = math.prod(shape[:-1]), shape[-1]
        along, across = sizes if columnwise else sizes[::-1]
        blocks = -(-along // _BLOCK)
        if self.block_scaling_dim == 1:
            return blocks, -(-across // 4) * 4
        return -(-across // _BLOCK), -(-blocks // 4) * 4

    def make_empty(self, shape: Sequence[int], *, dtype: Any = None, device: Any = None) -> Any:
        found: list[Tensor | None] = [None] * 4
        for index, usage in enumerate((self.rowwise_usage, self.columnwise_usage)):
            if usage:
                data = _columns(shape, device) if index else torch.empty(*shape, dtype=torch.uint8, device=device)
                scales = torch.empty(self.scale_shape(shape, bool(index)), dtype=torch.float32, device=device)
                found[2 * index : 2 * index + 2] = data, scales
        rows, row_scales, columns, column_scales = found
        storages = rows, row_scales, columns, column_scales
        return Float8BlockwiseQTensorStorage(*storages, self.dtype, self, self.block_scaling_dim == 2, dtype)


def prepare_for_saving(*values: Any) -> tuple[list[Tensor | None], list[Any]]:
    """Tensors, of quantized ones their memory, and how to put them together again."""
    tensors: list[Tensor | None] = []
    objects = []
    for value in values:
        kept = copy.copy(value) if isinstance(value, QuantizedTensorStorage) else None
        objects.append(kept)
        tensors += kept.prepare_for_saving() if kept is not None else [value]
    return tensors, objects


def restore_from_func_ctx(ctx: Any) -> list[Any]:
    """What ``prepare_for_saving`` was given."""
    tensors, found = iter(ctx.saved_tensors), []
    for kept in ctx.tensor_objects:
        if kept is None:
            found.append(next(tensors))
        else:
            vars(kept).update({name: next(tensors) for name in kept.parts})
            found.append(kept)
    ctx.tensor_objects = None
    return found


def general_gemm(
    A: Any,
    B: Any,
    out_dtype: torch.dtype | None = None,
    layout: str = "TN",
    out: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Any, None, None, None]:
    """``B A^T`` and the like (cpp_extensions/gemm.py): the result, if it is not given, and the workspace."""
    a, b = A.size(), B.size()
    rows, inner = b if layout[1] == "N" else b[::-1]
    columns = a[0] if layout[0] == "T" else a[1]
    quantized = isinstance(A, QuantizedTensorStorage)
    like = next(tensor for name in A.parts if (tensor := getattr(A, name)) is not None) if quantized else A
    workspace(like)
    if out is None:
        out = like.new_empty(rows, columns, dtype=out_dtype)
    if quantized:
        _count_product(rows, inner, columns)
    else:
        gemm_into(out, B.t() if layout[1] == "T" else B, A.t() if layout[0] == "T" else A, accumulate=False)
    return out, None, None, None


def _count_product(rows: int, inner: int, columns: int) -> None:
    """At twice the rate of bf16. Of tensors on no device, which make no memory."""
    before = CLOCK.seconds
    shapes = (rows, inner), (inner, columns)
    first, second = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    torch.mm(first, second)
    CLOCK.seconds = (before + CLOCK.seconds) / 2


def nothing(*args: Any, **options: Any) -> None:
    """Kernels that write to what they are given."""


#: Of ``transformer_engine_torch``, what tiles call.
KERNELS: Any = SimpleNamespace(quantize=nothing, compute_amax=nothing, multi_tensor_compute_scale_and_scale_inv=nothing)

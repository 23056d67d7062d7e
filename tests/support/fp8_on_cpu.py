"""TransformerEngine's FP8 quantizers and GEMM on a CPU, in torch: for checks of what is built from them.

Scales, layouts and paddings are those of its kernels on Hopper. Operands must be contiguous there, and so here.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.module import base
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.tensor.storage import float8_tensor_storage
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

FP8, LARGEST, BLOCK = torch.float8_e4m3fn, 448.0, 128


def quantizer(recipe: str, weight: bool = False, group: Any = None) -> Any:
    """Of a recipe, by Megatron's name.

    Args:
        weight: for a weight.
        group: over which current scaling takes its largest value.
    """
    if recipe == "tensorwise":
        reduced = {"with_amax_reduction": group is not None, "amax_reduction_group": group}
        return Float8CurrentScalingQuantizer(DType.kFloat8E4M3, "cpu", **reduced)
    if recipe == "delayed":
        return Float8Quantizer(torch.full((1,), 32.0), torch.zeros(1), DType.kFloat8E4M3)
    return Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=2 if weight else 1)


@torch.no_grad()
def quantize(tensor: Tensor, by: Any, output: Any = None, *unused: Any) -> Any:
    if output is not None:  # in place
        made = quantize(tensor, by)
        by_blocks = (f"_{layout}_{part}" for layout in ("rowwise", "columnwise") for part in ("data", "scale_inv"))
        for name in ("_data", "_transpose", "_scale_inv", *by_blocks):
            if (value := getattr(made, name, None)) is not None:
                assert getattr(output, name).shape == value.shape
                getattr(output, name).copy_(value)
        return output
    assert tensor.dim() == 2
    values = tensor.contiguous().float()
    if isinstance(by, Float8BlockQuantizer):
        assert by.rowwise_usage or by.block_scaling_dim == 1, "kernels of square blocks do not make columns alone"
        rows = _blocks(values, by.block_scaling_dim) if by.rowwise_usage else (None, None)
        columns = _blocks(values.t().contiguous(), by.block_scaling_dim) if by.columnwise_usage else (None, None)
        return _by_blocks(by, *rows, *columns)
    assert by.rowwise_usage, "kernels of one scale do not make columns alone"
    amax = values.abs().amax().reshape(1) if values.numel() else torch.zeros(1)
    if isinstance(by, Float8Quantizer):
        by.amax.copy_(torch.maximum(by.amax, amax.view(by.amax.shape)))
        scale = by.scale.reshape(1)
    else:
        if by.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=by.amax_reduction_group)
        scale = LARGEST / amax
    data = _cast(values * scale)
    return _by_tensor(by, data, 1 / scale, data.t().contiguous() if by.columnwise_usage else None)


@torch.no_grad()
def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().amax())


def compute_scales(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], largest: float, force_pow_2_scales: bool, epsilon: float
) -> None:
    assert largest == LARGEST and not force_pow_2_scales and not epsilon
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(largest / amax)
        inverse.copy_(1 / scale)


def gemm(
    a: Any, b: Any, *, layout: str, out: Tensor, out_dtype: torch.dtype, accumulate: bool, grad: bool, **unused: Any
) -> None:
    """``general_gemm``: TN is b @ a.T, NN is b @ a, NT is b.T @ a."""
    assert out.is_contiguous() and out.dtype == out_dtype and grad == (layout != "TN")
    left = columns_of(b) if layout == "NT" else rows_of(b)
    right = rows_of(a) if layout == "TN" else columns_of(a)
    product = left @ right.t()
    assert product.shape == out.shape
    out.copy_(out.float() + product if accumulate else product)


def as_tensor(operand: Any) -> Any:
    """What quantizers make that are not internal."""
    fields = operand.get_metadata()
    kind = Float8BlockwiseQTensor if isinstance(operand, Float8BlockwiseQTensorStorage) else Float8Tensor
    data = operand._data if kind is Float8Tensor else operand._rowwise_data
    fields.pop("fake_dtype")
    return kind(shape=data.shape, dtype=torch.bfloat16, device=data.device, **fields)


def quantize_weight(tensor: Tensor, by: Any, output: Any = None, *unused: Any) -> Any:
    made = quantize(tensor, by, output)
    return made if by.internal or output is not None else as_tensor(made)


def split_quantize(tensor: Tensor, sizes: list[int], by: list[Any], **unused: Any) -> list[Any]:
    assert tensor.is_contiguous() and all(size % 16 == 0 for size in sizes)
    return [quantize(part, one) for part, one in zip(tensor.split(sizes), by, strict=True)]


def bgrad_quantize(grad: Tensor, by: Any) -> tuple[Tensor, Any]:
    return grad.sum(0), quantize(grad, by)


def grouped_gemm(
    a: list[Any],
    b: list[Any],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    *,
    layout: str = "TN",
    m_splits: list[int],
    grad: bool = False,
    accumulate: bool = False,
    single_output: bool = False,
    bias: Any = None,
    use_bias: bool | None = False,
    use_split_accumulator: bool = False,
) -> Any:
    """``general_grouped_gemm``; ``bias`` is added by TN alone."""
    outputs = out[0].split(m_splits) if single_output else out
    assert len(a) == len(b) == len(outputs) == len(quantization_params)
    for index, (one, other, total) in enumerate(zip(a, b, outputs, strict=True)):
        gemm(one, other, layout=layout, out=total, out_dtype=total.dtype, accumulate=accumulate, grad=grad)
        if use_bias and not grad:
            total += bias[index]
    return out, [None] * len(a), None


def pad_rows(tensor: Tensor, out: Tensor, sizes: list[int], padded: list[int]) -> None:
    for part, into in zip(tensor.split(sizes), out.split(padded), strict=True):
        into[: len(part)], into[len(part) :] = part, 0


def unpad_rows(tensor: Tensor, out: Tensor, padded: list[int], sizes: list[int]) -> None:
    for part, into in zip(tensor.split(padded), out.split(sizes), strict=True):
        into.copy_(part[: len(into)])


def update_scales(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: int
) -> None:
    assert algorithm == "max" and not margin
    for now, history, scale in zip(amaxes.split([len(one) for one in scales]), histories, scales, strict=True):
        history[0] = now
        largest = history.amax(0)
        scale.copy_(torch.where(largest > 0, LARGEST / largest, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


def rows_of(operand: Any) -> Tensor:
    if isinstance(operand, Float8TensorStorage):
        return _values(operand._data) * operand._scale_inv
    return _dequantized(operand._rowwise_data, operand._rowwise_scale_inv, operand._is_2D_scaled)


def columns_of(operand: Any) -> Tensor:
    if isinstance(operand, Float8TensorStorage):
        return _values(operand._transpose) * operand._scale_inv
    return _dequantized(operand._columnwise_data, operand._columnwise_scale_inv, operand._is_2D_scaled)


def install(loop: Any) -> None:
    """Put these in place, for this process.

    Args:
        loop: the module whose ``general_gemm`` is replaced.
    """
    tex.quantize, tex.split_quantize, tex.bgrad_quantize = quantize, split_quantize, bgrad_quantize
    tex.compute_amax = compute_amax
    tex.multi_tensor_compute_scale_and_scale_inv = compute_scales
    tex.fp8_transpose = lambda data, dtype, out=None: data.t().contiguous()
    tex.swap_first_dims = lambda tensor, out: out.copy_(tensor.transpose(0, 1))
    loop.general_gemm = gemm
    float8_tensor_storage.is_non_tn_fp8_gemm_supported = lambda: False
    for kind in (Float8BlockQuantizer, Float8CurrentScalingQuantizer, Float8Quantizer):
        kind.make_empty = _empty
    torch.cuda.current_device = lambda: "cpu"
    dist._coalescing_manager = _one_by_one


def install_for_modules(grouped_linear: Any, experts: Any) -> None:
    """What grouped layers of TransformerEngine's want besides, and experts over them."""
    grouped_linear.general_grouped_gemm = experts.GROUPED_GEMM = grouped_gemm
    tex.fused_multi_row_padding, tex.fused_multi_row_unpadding = pad_rows, unpad_rows
    tex.fused_amax_and_scale_update_after_reduction = update_scales
    quantization.check_recipe_support = lambda recipe: None
    quantization.FP8GlobalStateManager.is_fp8_available = classmethod(lambda cls: (True, ""))
    quantization.FP8GlobalStateManager.is_fp8_block_scaling_available = classmethod(lambda cls: (True, ""))
    tex.quantize = quantize_weight
    base.is_non_tn_fp8_gemm_supported = lambda: False
    torch.cuda.is_current_stream_capturing = lambda: False
    layer = grouped_linear.TransformerEngineBaseModule
    prepare = layer.prepare_forward

    def prepare_forward(self: Any, inp: Tensor, *args: Any, **options: Any) -> Tensor:
        Tensor.is_cuda = property(lambda _: True)  # it refuses others
        try:
            prepared: Tensor = prepare(self, inp, *args, **options)
        finally:
            del Tensor.is_cuda
        return prepared

    layer.prepare_forward = prepare_forward


def _cast(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)


def _blocks(values: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape
    height = BLOCK if dimensions == 2 else 1
    padded = F.pad(values, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12)
    scales = torch.exp2(torch.floor(torch.log2(LARGEST / amax)))
    data = _cast(blocks * scales).view(padded.shape)[:rows, :columns].contiguous()
    inverse = (1 / scales)[:, 0, :, 0]
    inverse = inverse if dimensions == 2 else inverse.t()
    return data, F.pad(inverse, (0, -inverse.shape[1] % 4)).contiguous()


def _values(data: Tensor) -> Tensor:
    assert data.is_contiguous()
    return data.view(FP8).float()


def _dequantized(data: Tensor, inverse: Tensor, in_two_dimensions: bool) -> Tensor:
    (rows, columns), blocks = data.shape, -(-data.shape[1] // BLOCK)
    shape = (-(-rows // BLOCK), blocks + -blocks % 4) if in_two_dimensions else (blocks, rows + -rows % 4)
    assert inverse.is_contiguous() and inverse.shape == shape
    if in_two_dimensions:
        scales = inverse.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    else:
        scales = inverse[:, :rows].t().repeat_interleave(BLOCK, 1)[:, :columns]
    return _values(data) * scales


def _by_tensor(by: Any, data: Tensor | None, inverse: Tensor, transpose: Tensor | None) -> Any:
    return Float8TensorStorage(
        data=data,
        data_transpose=transpose,
        fp8_scale_inv=inverse,
        fp8_dtype=by.dtype,
        fake_dtype=torch.bfloat16,
        quantizer=by,
    )


def _by_blocks(by: Any, *tensors: Tensor | None) -> Any:
    two = by.block_scaling_dim == 2
    return Float8BlockwiseQTensorStorage(*tensors, by.dtype, by, two, fake_dtype=torch.bfloat16)


def _empty(by: Any, shape: list[int], **unused: Any) -> Any:
    rows, columns = shape
    if not isinstance(by, Float8BlockQuantizer):
        return _by_tensor(by, torch.empty(rows, columns, dtype=torch.uint8), torch.ones(1), None)
    tensors: list[Tensor | None] = [None] * 4
    if by.rowwise_usage:
        tensors[:2] = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(by.get_scale_shape(shape, False))
    if by.columnwise_usage:
        tensors[2:] = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(by.get_scale_shape(shape, True))
    return _by_blocks(by, *tensors)


@contextmanager
def _one_by_one(**unused: Any) -> Any:
    """In place of torch's coalescing of collectives, which gloo has not."""

    class Done:
        @staticmethod
        def wait() -> None: ...

    yield Done

"""The planner's GroupedLinear: weights of several experts, ``weight0``, ``weight1``, ...; and products by name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.fp8 import FP8GlobalStateManager
from megatron_tiling.plan.transformer_engine.kernels import weight_gradient, workspace
from megatron_tiling.plan.transformer_engine.linear import TransformerEngineBaseModule, drawn
from megatron_tiling.plan.transformer_engine.refused import refusal
from megatron_tiling.tiles.gemm import gemm_into


def _evenly(rows: int, experts: int) -> list[int]:
    """Rows of each expert. How many a router would send there is not known without its values."""
    return [rows // experts + (index < rows % experts) for index in range(experts)]


class _GroupedLinear(torch.autograd.Function):
    """module/grouped_linear.py, not its fused path (NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM).

    Keeps: the input, which is freed when the weights' gradients are there. Makes: the output; in the backward pass the
    input's gradient; the weights' in one piece, only where they are not added to main_grad.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, layer: Any, *parameters: Any) -> Tensor:
        workspace(input_, grouped=True)
        weights = parameters[: layer.num_gemms]
        rows = input_.reshape(-1, input_.shape[-1])
        ctx.layer, ctx.weights, ctx.shape = layer, weights, input_.shape
        ctx.cleared = [rows.detach()] if weights[0].requires_grad else []
        output = rows.new_empty(rows.shape[0], weights[0].shape[0])
        parts = _evenly(rows.shape[0], layer.num_gemms)
        for part, weight, out in zip(rows.split(parts), weights, output.split(parts), strict=True):
            torch.mm(part, weight.t(), out=out)
        return output.view(*input_.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        layer, weights = ctx.layer, ctx.weights
        gradient = grad_outputs[0].contiguous().view(-1, grad_outputs[0].shape[-1])
        parts = _evenly(gradient.shape[0], layer.num_gemms)
        dgrad = None
        if ctx.needs_input_grad[0]:
            dgrad = gradient.new_empty(gradient.shape[0], weights[0].shape[1])
            for part, weight, out in zip(gradient.split(parts), weights, dgrad.split(parts), strict=True):
                torch.mm(part, weight, out=out)
        wgrads: list[Any] = [None] * len(weights)
        if weights[0].requires_grad:
            rows, fuse = ctx.cleared.pop(), layer.fuse_wgrad_accumulation
            packed = None if fuse else gradient.new_empty(len(weights), *weights[0].shape)
            of_experts = zip(weights, gradient.split(parts), rows.split(parts), strict=True)
            wgrads = [
                weight_gradient(weight, grad, part, fuse, None if packed is None else packed[index])
                for index, (weight, grad, part) in enumerate(of_experts)
            ]
        biases = [gradient.new_empty(gradient.shape[-1]) for _ in weights] if layer.apply_bias else []
        return None if dgrad is None else dgrad.view(ctx.shape), None, *wgrads, *biases


class GroupedLinear(TransformerEngineBaseModule):
    """See ``_GroupedLinear``."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        tp_group: Any = None,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        delay_wgrad_compute: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if delay_wgrad_compute or single_grouped_weight or single_grouped_bias:
            flags = "--delay-wgrad-compute, --moe-single-grouped-weight and --moe-single-grouped-bias"
            raise refusal("grouped experts with an option of these", f"leave out {flags}")
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.fuse_wgrad_accumulation, self.save_original_input = fuse_wgrad_accumulation, False
        if parallel_mode == "column":
            out_features //= self.tp_size
        elif parallel_mode == "row":
            in_features //= self.tp_size
        of_tensors = {"dtype": params_dtype, "device": device}
        for index in range(num_gemms):
            shape = out_features, in_features
            weight = drawn(shape, init_method, get_rng_state_tracker, rng_tracker_name, **of_tensors)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                zeros = torch.zeros(out_features, **of_tensors)
                self.register_parameter(f"bias{index}", torch.nn.Parameter(zeros))

    def forward(self, x: Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Any:
        """``[rows, h]`` of all experts; how many of each makes no difference to memory."""
        if FP8GlobalStateManager.is_fp8_enabled():
            raise refusal("grouped experts in FP8", "leave out --fp8-format")
        weights, biases = (
            [getattr(self, f"{kind}{index}") for index in range(self.num_gemms)] if there else []
            for kind, there in (("weight", True), ("bias", self.use_bias))
        )
        output = _GroupedLinear.apply(x, self, *weights, *(biases if self.apply_bias else ()))
        return (output, biases) if self.return_bias else output


def general_grouped_gemm(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    out: Sequence[Tensor],
    quantization_params: Any,
    out_dtype: torch.dtype,
    layout: str = "TN",
    accumulate: bool = False,
    **options: Any,
) -> None:
    """``out[i] = B[i] A[i]^T`` and the like (cpp_extensions/gemm.py): nothing but the workspaces."""
    workspace(A[0], grouped=True)
    for a, b, result in zip(A, B, out, strict=True):
        first, second = (b.t() if layout[1] == "T" else b), (a.t() if layout[0] == "T" else a)
        gemm_into(result, first, second, accumulate=accumulate)

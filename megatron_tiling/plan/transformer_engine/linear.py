"""The planner's Linear and LayerNormLinear."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.transformer_engine.fp8 import FP8GlobalStateManager
from megatron_tiling.plan.transformer_engine.fp8_linear import FP8Linear
from megatron_tiling.plan.transformer_engine.kernels import gathered, reduce_scattered, weight_gradient, workspace
from megatron_tiling.plan.transformer_engine.norms import norm_gradients, normalized
from megatron_tiling.plan.transformer_engine.refused import refusal


class TransformerEngineBaseModule(torch.nn.Module):
    """What Megatron reads of a layer."""

    fp8 = fp8_calibration = primary_weights_in_fp8 = False
    tp_group: Any = None
    fuse_wgrad_accumulation = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.quantizers: dict[str, Any] = {}
        self._fp8_workspaces: dict[str, Any] = {}

    def set_tensor_parallel_group(self, group: Any) -> None:
        """Which it communicates with."""
        self.tp_group = group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """FP8 is off."""

    @contextlib.contextmanager
    def prepare_forward_ctx(self, x: Tensor) -> Iterator[Tensor]:
        """In it the layer has its quantizers."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        if recipe is not None and not self.quantizers:
            self.quantizers = recipe.quantizers(x.device)
        yield x

    def get_extra_state(self) -> Tensor:
        """Of FP8: nothing."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """There is none."""


def drawn(
    shape: tuple[int, ...],
    init_method: Callable[[Tensor], Any] | None,
    tracker: Callable[[], Any] | None,
    name: str | None,
    **options: Any,
) -> torch.nn.Parameter:
    """A weight."""
    weight = torch.nn.Parameter(torch.empty(shape, **options))
    fork = contextlib.nullcontext() if tracker is None else tracker().fork(*([name] if name else []))
    with fork:
        if init_method is not None:
            init_method(weight)
    return weight


def _gradients(layer: Any, weight: Any, grad_output: Tensor, kept: Tensor, requires_dgrad: bool) -> Any:
    """Of weight, bias and input."""
    column, row = layer.parallel_mode == "column", layer.parallel_mode == "row"
    grad_output = grad_output.reshape(-1, grad_output.shape[-1]).contiguous()
    if row and layer.sequence_parallel:
        grad_output = gathered(grad_output, layer.tp_group)
    rows = kept.reshape(-1, kept.shape[-1])
    total = gathered(rows, layer.tp_group) if column and layer.sequence_parallel and weight.requires_grad else rows
    dgrad = None
    if requires_dgrad:
        product = torch.mm(grad_output, weight)
        dgrad = reduce_scattered(product, layer.tp_group) if column and layer.sequence_parallel else product
        if column and layer.tp_size > 1 and not layer.sequence_parallel:
            torch.distributed.all_reduce(dgrad, group=layer.tp_group)
    wgrad = None
    if weight.requires_grad:
        wgrad = weight_gradient(weight, grad_output, total, layer.fuse_wgrad_accumulation)
    bias_grad = grad_output.new_empty(grad_output.shape[-1]) if layer.apply_bias else None
    return wgrad, bias_grad, dgrad


def _product(layer: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[T, k]`` -> ``[T, n]``, with the rows of all ranks, or their sum, where the layer says so."""
    workspace(rows)
    column, row = layer.parallel_mode == "column", layer.parallel_mode == "row"
    total = gathered(rows, layer.tp_group) if column and layer.sequence_parallel else rows
    product = torch.mm(total, weight.t()) if bias is None else torch.addmm(bias, total, weight.t())
    del total
    if not row or layer.tp_size == 1:
        return product
    if layer.sequence_parallel:
        return reduce_scattered(product, layer.tp_group)
    torch.distributed.all_reduce(product, group=layer.tp_group)
    return product


class _Linear(torch.autograd.Function):
    """module/linear.py.

    Keeps: the input, this rank's (gathered again in the backward pass under sequence parallelism), and the weight.
    Makes: the output, whole before it is reduced and scattered; the gathered input, freed after the product. Backward:
    the gathered gradient of the output (row layers) or input (column layers), the input's gradient, whole until the
    weight's is there; the weight's only where it is not added to main_grad.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Any, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.weight, ctx.requires_dgrad = layer, weight, input_.requires_grad
        ctx.save_for_backward(input_ if weight.requires_grad else None)
        ctx.shape = input_.shape
        output = _product(layer, input_.reshape(-1, input_.shape[-1]), weight, bias)
        return output.view(-1, *input_.shape[1:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (kept,) = ctx.saved_tensors
        kept = kept if kept is not None else grad_outputs[0].new_empty(0, ctx.shape[-1])
        wgrad, bias_grad, dgrad = _gradients(ctx.layer, ctx.weight, grad_outputs[0], kept, ctx.requires_dgrad)
        return None if dgrad is None else dgrad.view(ctx.shape), wgrad, bias_grad, None


class _LayerNormLinear(torch.autograd.Function):
    """module/layernorm_linear.py.

    Keeps: the input; the norm's output, this rank's, unless the weight is frozen; float32 ``[T]`` inverse deviations,
    and means of LayerNorm. Makes: what Linear does; in the backward pass the norm's output is freed after the weight's
    gradient, before the norm's gradients are made.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, layer: Any) -> Any:
        rows = input_.reshape(-1, input_.shape[-1])
        output, mean, deviation = normalized(rows, norm_bias)
        CLOCK.touch(rows, output)
        product = _product(layer, output, weight, bias)
        returned = None
        if layer.return_layernorm_output:
            gathers = layer.return_layernorm_output_gathered and layer.sequence_parallel
            returned = gathered(output, layer.tp_group) if gathers else output
            returned = returned.view(-1, *input_.shape[1:])
        ctx.layer, ctx.weight, ctx.norm_bias, ctx.shape = layer, weight, norm_bias, input_.shape
        ctx.save_for_backward(rows, norm_weight)
        # Not among the saved tensors, which live until the whole backward function has returned.
        ctx.cleared = [mean, deviation, output if weight.requires_grad else None]
        return product.view(-1, *input_.shape[1:-1], product.shape[-1]), returned

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows, norm_weight = ctx.saved_tensors
        layer, grad_output = ctx.layer, grad_outputs[0]
        output = ctx.cleared.pop()
        kept = output if output is not None else rows
        wgrad, bias_grad, dgrad = _gradients(layer, ctx.weight, grad_output, kept, requires_dgrad=True)
        del output, kept
        if layer.return_layernorm_output and grad_outputs[1] is not None:
            dgrad = dgrad + grad_outputs[1].reshape(dgrad.shape)
        grad_rows, norm_grad, norm_bias_grad = norm_gradients(rows, norm_weight, ctx.norm_bias)
        CLOCK.touch(rows, dgrad, grad_rows)
        ctx.cleared.clear()
        return grad_rows.view(ctx.shape), wgrad, bias_grad, norm_grad, norm_bias_grad, None


class Linear(TransformerEngineBaseModule):
    """See ``_Linear``."""

    weight: Any
    bias: Any

    return_layernorm_output = return_layernorm_output_gathered = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if delay_wgrad_compute or symmetric_ar_type or any(options.get(name) for name in options if name[:3] == "ub_"):
            flags = "--tp-comm-overlap, --delay-wgrad-compute and --symmetric-ar-type"
            raise refusal("linear layers with an option of these", f"leave out {flags}")
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.ub_name, self.save_original_input = ub_name, False
        self._tensor_options = {"dtype": params_dtype, "device": device}
        self._make_norm()
        shape = self.out_features, self.in_features
        self.weight = drawn(shape, init_method, get_rng_state_tracker, rng_tracker_name, **self._tensor_options)
        self.bias = torch.Tensor()
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **self._tensor_options))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1
        if bias and parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel

    def _make_norm(self) -> None:
        """LayerNormLinear has one, before the weight."""

    def weight_in_fp8(self, needs_dgrad: bool) -> tuple[Any, bool]:
        """A copy for this micro-batch, or one that is held, and whether that was made now (module/base.py)."""
        quantizer, held = self.quantizers["scaling_fwd"][1], self._fp8_workspaces.get("weight")
        if held is not None:
            return held, False
        quantizer.set_usage(rowwise=True, columnwise=needs_dgrad)
        copy = quantizer(self.weight)
        if self._holds_copies:
            self._fp8_workspaces["weight"] = copy
        return copy, self._holds_copies

    def _run_in_fp8(self, x: Tensor, bias: Tensor | None, *norm: Any) -> tuple[Tensor, Tensor | None]:
        with self.prepare_forward_ctx(x):
            options = self, torch.is_grad_enabled()
            output, returned = FP8Linear.apply(x, self.weight, bias, *(norm or (None, None)), *options)
        return output, returned

    def _run(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if FP8GlobalStateManager.is_fp8_enabled():
            return self._run_in_fp8(x, bias)
        output: Tensor = _Linear.apply(x, self.weight, bias, self)
        return output, None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """``[s, b, k]`` -> ``[s, b, n]``, with the bias and the norm's output where they are asked for."""
        self._holds_copies = is_first_microbatch is not None
        output, returned = self._run(x, self.bias if self.apply_bias and self.parallel_mode != "row" else None)
        if self.apply_bias and self.parallel_mode == "row":
            output = output + self.bias
        outputs = (output, *([self.bias] * self.return_bias), *([returned] * self.return_layernorm_output))
        return outputs if len(outputs) > 1 else output


class LayerNormLinear(Linear):
    """See ``_LayerNormLinear``."""

    layer_norm_weight: Any
    layer_norm_bias: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        **kwargs: Any,
    ) -> None:
        self._norm_options = eps, normalization, zero_centered_gamma
        super().__init__(in_features, out_features, **kwargs)
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered

    def _make_norm(self) -> None:
        self.eps, self.normalization, self.zero_centered_gamma = self._norm_options
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(self.in_features, **self._tensor_options))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if self.normalization != "RMSNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(self.in_features, **self._tensor_options))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def _run(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        norm = self.layer_norm_weight, self.layer_norm_bias
        if FP8GlobalStateManager.is_fp8_enabled():
            return self._run_in_fp8(x, bias, *norm)
        output, returned = _LayerNormLinear.apply(x, self.weight, bias, *norm, self)
        return output, returned

"""The planner's Linear and LayerNormLinear in FP8, of weights in high precision."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.fp8 import (
    Float8Quantizer,
    general_gemm,
    prepare_for_saving,
    restore_from_func_ctx,
)
from megatron_tiling.plan.transformer_engine.fp8_gather import (
    allreduce,
    gather_along_first_dim,
    reduce_scatter_along_first_dim,
)
from megatron_tiling.plan.transformer_engine.kernels import get_dummy_wgrad
from megatron_tiling.plan.transformer_engine.norms import norm_gradients, normalized


class FP8Linear(torch.autograd.Function):
    """module/linear.py, module/layernorm_linear.py.

    Keeps: of the input of the product its columns in FP8, or the input where the layer is told to, unless the weight is
    frozen; the weight in FP8, rows and columns, over micro-batches. Before it a norm: its input, and float32 ``[T]``.
    Makes: the norm's output, then its rows and columns in FP8; the output. Backward: rows and columns of the output's
    gradient in FP8, the input's gradient; the weight's only where it is not added to main_grad. Under sequence
    parallelism rows are gathered in FP8, of one scale without columns, which are made of all of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        weight: Any,
        bias: Any,
        norm_weight: Any,
        norm_bias: Any,
        layer: Any,
        grad_enabled: bool,
    ) -> Any:
        rows, with_norm = input_.reshape(-1, input_.shape[-1]), norm_weight is not None
        output: Any
        output, mean, deviation = normalized(rows, norm_bias) if with_norm else (rows, None, None)
        keeps_input = layer.save_original_input and not with_norm
        keeps_columns = grad_enabled and weight.requires_grad and not keeps_input
        returned = output.view(input_.shape) if layer.return_layernorm_output else None
        quantizer = layer.quantizers["scaling_fwd"][0]
        gathers = layer.sequence_parallel and layer.parallel_mode == "column"
        rows_alone = gathers and quantizer.supports_only_rowwise_all_gather()
        quantizer.set_usage(rowwise=True, columnwise=keeps_columns and not rows_alone)
        if type(quantizer) is Float8Quantizer:  # the norm's kernel quantizes: never both
            output = None
        operand = quantizer(rows)
        del output
        in_fp8, ctx.returns_copy = layer.weight_in_fp8(input_.requires_grad or with_norm)
        total = operand
        if gathers:
            quantizer.set_usage(rowwise=True, columnwise=False)
            total = gather_along_first_dim(operand, layer.tp_group, quantizer=quantizer)[0]
        product = general_gemm(in_fp8, total, out_dtype=input_.dtype)[0]
        del total
        if layer.parallel_mode == "row" and layer.tp_size > 1:
            reduces = reduce_scatter_along_first_dim if layer.sequence_parallel else allreduce
            product = reduces(product, layer.tp_group)[0]
        if keeps_columns and not rows_alone:
            operand.update_usage(rowwise_usage=False, columnwise_usage=True)
        ctx.layer, ctx.weight, ctx.norm_bias, ctx.shape = layer, weight, norm_bias, input_.shape
        ctx.with_bias, ctx.requires_dgrad = bias is not None, input_.requires_grad or with_norm
        needs_rows = with_norm or (keeps_input and weight.requires_grad)
        tensors, ctx.tensor_objects = prepare_for_saving(in_fp8, rows if needs_rows else None, norm_weight)
        ctx.save_for_backward(*tensors)
        # Freed before the backward function has returned, as saved tensors are not.
        ctx.cleared = [mean, deviation, operand if keeps_columns else None]
        product = product.view(-1, *input_.shape[1:-1], product.shape[-1])
        return product, returned

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        in_fp8, rows, norm_weight = restore_from_func_ctx(ctx)
        layer, weight, operand = ctx.layer, ctx.weight, ctx.cleared.pop()
        zeros = torch.empty_like(weight) if ctx.returns_copy else None  # autograd's, of an output without a gradient
        gradient = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1]).contiguous()
        bias_grad = gradient.new_empty(gradient.shape[-1]) if ctx.with_bias else None
        quantizer = layer.quantizers["scaling_bwd"][0]
        quantizer.set_usage(rowwise=True, columnwise=weight.requires_grad)
        scatters = layer.sequence_parallel and layer.parallel_mode == "row"
        in_fp8_gradient = (
            gather_along_first_dim(gradient, layer.tp_group, quantizer=quantizer)[0]
            if scatters
            else quantizer(gradient)
        )
        dgrad: Any = None
        product = wgrad = gathering = None
        of_input = layer.quantizers["scaling_fwd"][0]
        gathers = layer.sequence_parallel and layer.parallel_mode == "column"
        rows_alone = of_input.supports_only_rowwise_all_gather()
        if weight.requires_grad and operand is None:
            of_input.set_usage(rowwise=rows_alone, columnwise=not (rows_alone and gathers))
            operand = of_input(rows)
        part = operand  # held until the weight's gradient is there
        if weight.requires_grad and gathers:
            of_input.set_usage(rowwise=rows_alone, columnwise=not rows_alone)
            operand, gathering = gather_along_first_dim(operand, layer.tp_group, async_op=True, quantizer=of_input)
        if ctx.requires_dgrad:
            in_fp8.update_usage(columnwise_usage=True)
            dgrad = product = general_gemm(in_fp8, in_fp8_gradient, out_dtype=gradient.dtype, layout="NN")[0]
            if layer.parallel_mode == "column" and layer.tp_size > 1:
                reduces = reduce_scatter_along_first_dim if layer.sequence_parallel else allreduce
                dgrad = reduces(product, layer.tp_group)[0]
        if weight.requires_grad:
            if gathering is not None:
                gathering.wait()
            operand.update_usage(columnwise_usage=True)
            fuses = layer.fuse_wgrad_accumulation
            out = weight.main_grad if fuses else None
            wgrad = general_gemm(operand, in_fp8_gradient, out_dtype=gradient.dtype, layout="NT", out=out)[0]
            del operand, part
            if fuses:
                wgrad = None
                if hasattr(weight, "grad_added_to_main_grad"):
                    weight.grad_added_to_main_grad = True
                    wgrad = get_dummy_wgrad(list(weight.shape), weight.dtype)
        if scatters:
            del in_fp8_gradient
        norm_grad = norm_bias_grad = None
        if norm_weight is not None:
            if layer.return_layernorm_output and grad_outputs[1] is not None:
                dgrad = dgrad + grad_outputs[1].reshape(dgrad.shape)
            dgrad, norm_grad, norm_bias_grad = norm_gradients(rows, norm_weight, ctx.norm_bias)
        ctx.cleared.clear()
        del zeros, product
        return None if dgrad is None else dgrad.view(ctx.shape), wgrad, bias_grad, norm_grad, norm_bias_grad, None, None

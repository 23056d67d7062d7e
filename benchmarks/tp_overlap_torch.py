"""An MLP on torch's fused collectives and products, as torchtitan's asynchronous tensor parallelism calls them.

``symm_mem.fused_all_gather_matmul`` and ``symm_mem.fused_matmul_reduce_scatter`` go by the shards of the ranks, over
symmetric memory of their own, one workspace a group: they run one after the other, on the stream that calls them.
Multicast is off where ``TORCH_SYMM_MEM_DISABLE_MULTICAST`` is set.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory  # defines the ops
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_tiling.tiles.first_order import first_order
from megatron_tiling.tiles.wgrad import WHOLE, WeightGrad


def gathered_product(shard: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """``[s/tp, b, k]`` of each rank, ``[k, n]`` -> ``[s, b, k]`` of all, and its product ``[s, b, n]``."""
    whole, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(shard.contiguous(), [weight], 0, group)
    return whole, product


def scattered_product(whole: Tensor, weight: Tensor, group: str) -> Tensor:
    """``[s, b, k]``, ``[k, n]`` -> this rank's part ``[s/tp, b, n]`` of the product's sum over ranks."""
    shard: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(whole, weight, "sum", 0, group)
    return shard


class _MLP(torch.autograd.Function):
    """SwiGLU between fc1 ``U [2 * f, h]`` and fc2 ``W [h, f]``; weight gradients are added to ``main_grad``.

    ========  =======================================================================================
    forward   x ``[s/tp, b, h]`` -> x of all ranks, p ``[s, b, 2 * f]``; a ``[s, b, f]``; y ``[s/tp, b, h]``
    backward  dy ``[s/tp, b, h]`` -> dy of all ranks, da ``[s, b, f]``; dp; dx ``[s/tp, b, h]``; dW, dU
    ========  =======================================================================================

    x of all ranks and p are kept, and a is made again. Where dense gathers x again, nothing is gathered here.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, group: str) -> Tensor:
        from megatron.core.fusions.fused_bias_swiglu import swiglu

        whole, pre = gathered_product(hidden, fc1_weight.t(), group)
        output = scattered_product(swiglu(pre), fc2_weight.t(), group)
        ctx.save_for_backward(whole, pre)
        ctx.weights, ctx.group = (fc1_weight, fc2_weight), group  # they carry main_grad
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from megatron.core.fusions.fused_bias_swiglu import swiglu, swiglu_back

        whole, pre = ctx.saved_tensors
        fc1_weight, fc2_weight = ctx.weights
        grads = [WeightGrad(weight, fuse=True) for weight in ctx.weights]
        whole_grad, activated_grad = gathered_product(grad_output, fc2_weight, ctx.group)
        grads[1].add(WHOLE, WHOLE, whole_grad.flatten(0, 1), swiglu(pre).flatten(0, 1))
        del whole_grad
        pre_grad = swiglu_back(activated_grad, pre)
        del activated_grad, pre
        grad_input = scattered_product(pre_grad, fc1_weight, ctx.group)
        grads[0].add(WHOLE, WHOLE, pre_grad.flatten(0, 1), whole.flatten(0, 1))
        return grad_input, grads[0].result(), grads[1].result(), None


def forward(mlp: Any, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """``[s/tp, b, h]`` -> ``[s/tp, b, h]``, on the weights of Megatron's MLP, the norm in its fc1."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2

    def run(hidden: Tensor) -> Tensor:
        normalized = rms_norm(hidden, hidden.shape[-1:], fc1.layer_norm_weight, fc1.eps)
        output: Tensor = _MLP.apply(normalized, fc1.weight, fc2.weight, group.group_name)
        return output

    return run


def workspace_bytes() -> int:
    """Of the symmetric memory that torch's fused ops hold."""
    found = symmetric_memory._group_name_to_workspace_tensor.values()
    return sum(tensor.nbytes for tensor in found if tensor is not None)

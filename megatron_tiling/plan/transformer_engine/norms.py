"""The planner's RMSNorm and LayerNorm (ops/basic/rmsnorm.py, layer_norm.py), by themselves or in ops.Sequential."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.transformer_engine.kernels import run
from megatron_tiling.plan.transformer_engine.refused import refusal


def normalized(rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """``[T, h]``, and float32 ``[T]``: means, of LayerNorm alone, and inverse deviations."""
    mean = None if bias is None else rows.new_empty(rows.shape[0], dtype=torch.float32)
    return torch.empty_like(rows), mean, rows.new_empty(rows.shape[0], dtype=torch.float32)


def norm_gradients(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of input, weight and bias."""
    return torch.empty_like(rows), torch.empty_like(weight), None if bias is None else torch.empty_like(bias)


class RMSNorm(torch.nn.Module):
    """Keeps: the input, float32 ``[T]`` inverse deviations. Makes: the output; in the backward pass the gradients."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
        **options: Any,
    ) -> None:
        super().__init__()
        size = normalized_shape or hidden_size
        assert size is not None
        self.eps, self.zero_centered_gamma, self.normalized_shape = eps, zero_centered_gamma, size
        weight: Any = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        weight.sequence_parallel = sequence_parallel
        self.weight = weight
        self.bias: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]``."""

        def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            rows = x.reshape(-1, x.shape[-1])
            output, mean, deviation = normalized(rows, bias)

            def gradients(rows: Tensor, weight: Tensor, mean: Any, deviation: Any, grad: Tensor) -> Any:
                grad_rows, grad_weight, grad_bias = norm_gradients(grad.reshape(rows.shape), weight, bias)
                return grad_rows.view(grad.shape), grad_weight, grad_bias

            return output.view(x.shape), (rows, weight, mean, deviation), gradients

        return run(kernel, x, self.weight, self.bias)


class LayerNorm(RMSNorm):
    """As RMSNorm; keeps float32 ``[T]`` means too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = self.weight.sequence_parallel


class Sequential(torch.nn.Sequential):
    """Of the op fuser, which leaves a norm that is alone as it is."""

    def __init__(self, *operations: Any) -> None:
        if [type(operation) for operation in operations] not in ([RMSNorm], [LayerNorm]):
            raise refusal("TransformerEngine's op fuser", "leave out --use-transformer-engine-op-fuser")
        super().__init__(*operations)

"""Norms with TransformerEngine's constructor."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        size = normalized_shape or hidden_size
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        gamma = 0.0 if zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((size,), gamma, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, getattr(self, "bias", None), self.eps, self.zero_centered_gamma)


class LayerNorm(RMSNorm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = self.weight.sequence_parallel


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered_gamma: bool) -> Tensor:
    """RMSNorm where there is no bias, else LayerNorm."""
    gamma = weight + 1 if zero_centered_gamma else weight
    if bias is None:
        return rms_norm(x, weight.shape, gamma, eps)
    return layer_norm(x, weight.shape, gamma, bias, eps)

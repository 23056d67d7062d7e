"""The planner's FusedAdam and functions over many tensors (optimizers/), which read and write in place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.clock import CLOCK


class FusedAdam(torch.optim.Optimizer):
    """Holds, from the first step on: both moments, and weights in ``master_weight_dtype`` if it keeps them.

    optimizers/fused_adam.py.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        store_param_remainders: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})  # fmt: skip
        self.master_weights, self.capturable = master_weights, options.get("capturable", False)
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self._master_dtype = torch.int16 if store_param_remainders else master_weight_dtype

    def initialize_state(self, param: Tensor, *args: Any) -> None:
        """Of one parameter."""
        for name, dtype in self._dtypes.items():
            self.state[param][name] = torch.empty_like(param, dtype=dtype)
        if self.master_weights and param.dtype != torch.float32:
            self.state[param]["master_param"] = torch.empty_like(param, dtype=self._master_dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Makes states on the first call."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                has_grad = param.grad is not None or getattr(param, "decoupled_grad", None) is not None
                if has_grad:
                    if not self.state[param]:
                        self.initialize_state(param)
                    written = param, *self.state[param].values()
                    CLOCK.touch(written, written, param.grad, getattr(param, "decoupled_grad", None))


class FusedSGD(torch.optim.SGD):
    """Holds one buffer, with momentum."""


def multi_tensor_applier(
    op: Callable[..., Any], overflow: Tensor, tensors: Sequence[Sequence[Tensor]], *args: Any
) -> Any:
    """Calls ``op``."""
    return op(0, overflow, tensors, *args)


def multi_tensor_scale(chunk: int, overflow: Tensor, tensors: Any, *args: Any) -> None:
    """Writes to given tensors."""
    CLOCK.touch(tensors)


def multi_tensor_l2norm(chunk: int, overflow: Tensor, tensors: Any, per_parameter: bool = False, *args: Any) -> Any:
    """Makes a number, and one a tensor if asked for."""
    CLOCK.touch(tensors)
    return overflow.new_empty(1, dtype=torch.float32), overflow.new_empty(len(tensors[0]) if per_parameter else 0)


multi_tensor_scale_tensor = multi_tensor_adam = multi_tensor_sgd = multi_tensor_scale

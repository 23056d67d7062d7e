"""The planner's FusedAdam and functions over many tensors (optimizers/), which read and write in place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.plan.clock import CLOCK


class FusedAdam(torch.optim.Optimizer):
    """optimizers/fused_adam.py.

    Holds, from the first step on: both moments, and weights in ``master_weight_dtype`` if it keeps them, or the int16
    that bf16 weights lack. Makes, for each group: float32 copies of states of other types, unless moments are bf16.
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
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})  # fmt: skip
        self.master_weights, self.capturable = master_weights, capturable
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if master_weights:
            self._dtypes["master_param"] = master_weight_dtype
        self.use_decoupled_grad = use_decoupled_grad
        self._keeps_remainders = store_param_remainders and master_weights and master_weight_dtype == torch.float32
        self._scales: list[Tensor] = []
        self._moments_as_they_are = exp_avg_dtype == exp_avg_sq_dtype == torch.bfloat16

    def initialize_state(self, param: Tensor, *args: Any) -> None:
        """Of one parameter."""
        for name, dtype in self._dtypes.items():
            if name == "master_param" and self._keeps_remainders and param.dtype == torch.bfloat16:
                dtype = torch.int16
            self.state[param][name] = torch.empty_like(param, dtype=dtype)
            if self._dtypes[name] != torch.float32:
                self._scales.append(param.new_empty(1, dtype=torch.float32))

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """Makes states on the first call."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            wide: list[tuple[Tensor, Tensor]] = []
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is not None:
                    wide += [(state, state.float()) for state in self.state[param].values() if self._widens(state)]
                    written = param, *self.state[param].values()
                    CLOCK.touch(written, written, grad)
            for state, whole in wide:
                state.copy_(whole.bfloat16() if state.dtype == torch.bfloat16 else whole)

    def _widens(self, state: Tensor) -> bool:
        if state.dtype == torch.bfloat16:
            return not self._moments_as_they_are
        return state.dtype in (torch.float16, torch.uint8)


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


multi_tensor_scale_tensor = multi_tensor_scale

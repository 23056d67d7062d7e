"""Linear, LayerNormLinear and GroupedLinear: TransformerEngine's arguments, parameters and attributes."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.norms import normalize


class Linear(torch.nn.Module):
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
    ) -> None:
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.ub_name, self.save_original_input = ub_name, False
        self.options = {"dtype": params_dtype, "device": device}
        self.make_norm()
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **self.options))
        self.bias: Any = torch.Tensor()
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **self.options))
        with drawing(get_rng_state_tracker, rng_tracker_name):
            init_method(self.weight)
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1
        if bias and parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        self.state = torch.empty(0, dtype=torch.uint8)

    def make_norm(self) -> None:
        """LayerNormLinear has one, before the weight."""

    def normalized(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings  # not above: Megatron imports this module as it starts

        x, group = self.normalized(x), self.tp_group
        returned = x
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = x @ self.weight.t()
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        if self.apply_bias:
            y = y + self.bias
        if self.sequence_parallel and self.return_layernorm_output_gathered:
            returned = x
        outputs = (y, *([self.bias] * self.return_bias), *([returned] * self.return_layernorm_output))
        return outputs if len(outputs) > 1 else y

    def get_extra_state(self) -> Tensor:
        return self.state

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None:
            self.state = state


class LayerNormLinear(Linear):
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
        self.norm_options = (eps, normalization, zero_centered_gamma)
        super().__init__(in_features, out_features, **kwargs)
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered

    def make_norm(self) -> None:
        self.eps, normalization, self.zero_centered_gamma = self.norm_options
        gamma = 0.0 if self.zero_centered_gamma else 1.0
        self.layer_norm_weight = torch.nn.Parameter(torch.full((self.in_features,), gamma, **self.options))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if normalization == "RMSNorm":
            self.layer_norm_bias = None
        else:
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(self.in_features, **self.options))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def normalized(self, x: Tensor) -> Tensor:
        return normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)


class GroupedLinear(torch.nn.Module):
    """The weights of several experts, as ``weight0``, ``weight1``, ...; and their biases."""

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
        **unused: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.state = torch.empty(0, dtype=torch.uint8)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            with drawing(get_rng_state_tracker, rng_tracker_name):
                init_method(weight)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                zeros = torch.zeros(out_features, dtype=params_dtype, device=device)
                self.register_parameter(f"bias{index}", torch.nn.Parameter(zeros))

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        numbers = range(self.num_gemms)
        weights = [getattr(self, f"weight{index}") for index in numbers]
        outputs = [part @ weight.t() for part, weight in zip(x.split(m_splits), weights, strict=True)]
        if not self.use_bias:
            return torch.cat(outputs)
        biases = [getattr(self, f"bias{index}") for index in numbers]
        if self.return_bias:
            return torch.cat(outputs), biases
        return torch.cat([output + bias for output, bias in zip(outputs, biases, strict=True)])

    def set_tensor_parallel_group(self, group: Any) -> None:
        """There is no communication in it."""

    def init_fp8_metadata(self, num_gemms: int) -> None:
        """FP8 is off."""

    def get_extra_state(self) -> Tensor:
        return self.state

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None:
            self.state = state


def drawing(get_rng_state_tracker: Callable[[], Any] | None, name: str | None) -> Any:
    """The random state that TransformerEngine draws a weight from."""
    if get_rng_state_tracker is None:
        return contextlib.nullcontext()
    return get_rng_state_tracker().fork(*([name] if name else []))

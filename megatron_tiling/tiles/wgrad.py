"""Where the weight gradient of a tile loop goes: a new tensor for autograd, or straight into ``main_grad``."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.gemm import gemm_into

WHOLE = slice(None)


class WeightGrad:
    """The gradient ``[out_features, in_features]`` of one weight, filled slice by slice.

    With ``fuse=True`` and a ``main_grad`` on the weight (Megatron's DDP sets it, float32 or the weight's dtype),
    slices are added to ``main_grad`` in place, as Megatron's gradient accumulation fusion does with apex's kernel,
    and ``result`` is what Megatron's DDP hooks expect in its place. With ``wide=True`` slices that are added to several
    times are summed in float32 where there is no ``main_grad``.
    """

    def __init__(self, weight: Tensor, fuse: bool, wide: bool = False) -> None:
        self._weight = weight
        self._wide = wide
        self._tensor: Tensor | None = getattr(weight, "main_grad", None) if fuse else None
        self.fused = self._tensor is not None

    @property
    def tensor(self) -> Tensor:
        """Where slices go: memory of its own is there from the first one on."""
        if self._tensor is None:  # of a quantized weight too the gradient is a plain tensor
            dtype = self._weight.dtype
            dtype = torch.promote_types(dtype, torch.float32) if self._wide else dtype
            self._tensor = torch.empty(self._weight.shape, dtype=dtype, device=self._weight.device)
        return self._tensor

    def add(
        self, rows: slice, columns: slice, grad_output: Tensor, input_: Tensor, *, accumulate: bool = False
    ) -> None:
        """wgrad GEMM of one slice: ``[n, rows]`` and ``[n, columns]`` -> ``[rows, columns]``.

        ``accumulate`` adds to a slice that was given before: further tokens of the same micro-batch.
        """
        gemm_into(self.tensor[rows, columns], grad_output.t(), input_, accumulate=accumulate or self.fused)

    def result(self) -> Tensor | None:
        """What the autograd function returns for the weight, once every slice is there."""
        if not self.fused:
            return self.tensor.to(self._weight.dtype)
        if not hasattr(self._weight, "grad_added_to_main_grad"):
            return None
        # A gradient, though nobody reads it, keeps DDP's hooks on the main backward thread: see LinearWithGrad-
        # AccumulationAndAsyncCommunication in megatron-core's tensor_parallel/layers.py. DDP drops it at once.
        self._weight.grad_added_to_main_grad = True
        # zero_out_wgrad: this one DDP adds to main_grad; anomaly detection reads it.
        if getattr(self._weight, "zero_out_wgrad", False) or torch.is_anomaly_enabled():
            return torch.zeros(self._weight.shape, dtype=self._weight.dtype, device=self._weight.device)
        return _Placeholder(self._weight)


class _Placeholder(torch.Tensor):
    """Stands for a gradient that is in ``main_grad`` already: the weight's shape and dtype, and no memory.

    Autograd may hand it on and add it to other gradients of the same weight; every other use is an error.
    """

    def __new__(cls, weight: Tensor) -> "_Placeholder":
        placeholder: _Placeholder = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device
        )
        return placeholder

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        in_place = func is torch.ops.aten.add_.Tensor
        if in_place or func is torch.ops.aten.add.Tensor:
            augend, addend = args
            if isinstance(addend, cls) or not in_place:
                return augend if isinstance(addend, cls) else addend
        raise RuntimeError(
            f"{func} reads a weight gradient that gradient accumulation fusion has put into main_grad; "
            "leave fusion out with --no-gradient-accumulation-fusion"
        )

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"_Placeholder({tuple(self.shape)}, {self.dtype})"

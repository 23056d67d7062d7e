"""A GPU's memory from a process without one: where torch takes other ways on a GPU than on a CPU, it takes those.

``install`` is for a process that does nothing but plan: names of CUDA mean the CPU (``cpu.py``), tensors are fake, and

* functions that torch.compile makes one kernel of are a ``fused`` part of the tracker's;
* dropout keeps a mask of bytes, and the RMS norm a number a token, as their CUDA kernels do;
* torch's optimizers work on lists of tensors at once;
* states of random number generators, which fake tensors cannot be, are not kept;
* apex's kernel of fused weight gradients, which allocates nothing, exists.

Hazard: what is not listed runs as on a CPU. The comparison with GPU measurements, not this list, says what it is worth.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from megatron_tiling import cpu
from megatron_tiling.plan import transformer_engine
from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.compiled import scratch
from megatron_tiling.plan.tracker import Tracker
from megatron_tiling.plan.transformer_engine.refused import refusal
from megatron_tiling.tiles.device import plan_for_gpu
from megatron_tiling.tiles.gemm import gemm_into

#: Bytes. cuBLAS takes 32 MiB on Hopper for each pair of a handle and a stream (aten/src/ATen/cuda/CublasHandlePool.cpp,
#: getChosenWorkspaceSize), from torch's allocator; the thread of the backward pass has a handle of its own.
CUBLAS_WORKSPACES = 2 * 32 * 2**20
APEX_KERNELS = "fused_weight_gradient_mlp_cuda"
APEX_SOFTMAX = "scaled_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda"


def install(tracker: Tracker, with_transformer_engine: bool = False) -> None:
    """Before megatron is imported, which is told that TransformerEngine is installed, or that it is not."""
    plan_for_gpu(on_launch=CLOCK.touch)
    if with_transformer_engine:
        transformer_engine.install()
    else:
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    _patch_torch(tracker)
    _fuse_weight_gradients()
    _refuse_softmax()
    cpu.install()
    _copy_from_host(tracker)
    forget_random_states()
    _share_storages()


def _patch_torch(tracker: Tracker) -> None:
    functions: Any = torch.nn.functional
    stock_dropout, stock_tensor = functions.dropout, torch.tensor

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if p == 0 or not training or inplace:
            return stock_dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    def compile_(model: Any = None, **options: Any) -> Any:
        return functools.partial(_fused, tracker) if model is None else _fused(tracker, model)

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, (list, tuple)):
            data = tree_map_only(Tensor, Tensor.item, data)
        return stock_tensor(data, *args, **kwargs)

    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda device=None: (9, 0)  # Hopper's
    torch.tensor = tensor
    functions.dropout, functions.rms_norm = dropout, _rms_norm
    torch.compile = compile_
    for name in ("adam", "sgd"):
        lists: Any = importlib.import_module(f"torch.optim.{name}")
        lists._default_to_fused_or_foreach = lambda params, differentiable, use_fused=False: (False, not differentiable)


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RmsNorm.apply(input, weight, len(normalized_shape))


class _RmsNorm(torch.autograd.Function):
    """What aten's ``_fused_rms_norm`` keeps on a GPU: of ``[..., h]`` the input, the weight, a float32 a token."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, dimensions: int) -> Tensor:
        ctx.save_for_backward(input, weight, input.new_empty(input.shape[:-dimensions], dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), None if weight is None else torch.empty_like(weight), None


def _fused(tracker: Tracker, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        versions = [tensor._version for tensor in given]
        with tracker.fused():
            result = function(*args, **kwargs)
            beside = scratch(function, args)  # until the tracker has seen it
        written = [tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version]
        CLOCK.touch(given, written, beside, result)
        return result

    call._torchdynamo_orig_callable = function  # type: ignore[attr-defined]  # as torch.compile does
    return call


def _fuse_weight_gradients() -> None:
    def add_weight_gradient(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """``[n, i]`` and ``[n, o]`` -> ``[o, i]``, added: counted, and nothing allocated."""
        gemm_into(main_grad, grad_output.t(), input, accumulate=True)

    kernels = ModuleType(APEX_KERNELS)
    kernels.__spec__ = ModuleSpec(APEX_KERNELS, None)
    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        setattr(kernels, name, add_weight_gradient)
    sys.modules.setdefault(APEX_KERNELS, kernels)


def _refuse_softmax() -> None:
    def missing(*args: Any) -> None:
        raise refusal("apex's masked softmax", "add --no-masked-softmax-fusion")

    for name in APEX_SOFTMAX:
        kernels: Any = ModuleType(name)
        kernels.forward = kernels.backward = kernels.get_batch_per_block = missing
        sys.modules[name] = kernels


def _copy_from_host(tracker: Tracker) -> None:
    tensor, module = cast(Any, Tensor), cast(Any, torch.nn.Module)

    def apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """torch's own swaps fake parameters, which needs that nobody has a reference to them."""
        for part in self.modules() if recurse else [self]:
            for parameter in part._parameters.values():
                if parameter is not None:
                    parameter.data = fn(parameter.data)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else fn(buffer)
        return self

    module._apply = apply
    tensor.cuda = lambda self, *args, **kwargs: self.clone() if tracker.is_on_host(self) else self


class _RandomState:
    """Of all random number generators, always."""

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return torch.tensor(isinstance(other, _RandomState))

    def __hash__(self) -> int:
        return 0

    def clone(self) -> _RandomState:
        return self


def forget_random_states() -> None:
    """Fake tensors cannot be states of random number generators: all of those are one, which is not kept."""
    import megatron.core.tensor_parallel.random as random

    def forget(*args: Any, **kwargs: Any) -> None: ...

    def state(*args: Any, **kwargs: Any) -> _RandomState:
        return _RandomState()

    torch_: Any = torch
    for module in (torch_, torch_.cuda, torch_.cuda.random, torch_.random):
        module.get_rng_state, module.set_rng_state = state, forget
    random._set_cuda_rng_state = forget


def _share_storages() -> None:
    """Megatron's extension in C++, by which an output that it has discarded gets the memory of the one made again."""
    import megatron.core.tensor_parallel.random as random

    def share(discarded: Tensor, made: Tensor) -> None:
        storage = made.untyped_storage()
        weakref.finalize(discarded.untyped_storage(), storage.size).atexit = False  # holds it until then

    random._get_share_storage = lambda: share

"""TransformerEngine 2.17.1 for the planner: modules that allocate and keep what the real ones do, of fake tensors.

The real one's functions do not take fake tensors, and a machine that plans need not have it. Nothing is computed:
products are torch's, so that their time can be priced; the results of other kernels are empty. Docstrings name the file
upstream and list what is kept for the backward pass ("Keeps"), and what is made and freed beside results ("Makes").
``T`` is a rank's tokens; what has no dtype is in that of the activations.

bf16 and fp16 only. What is asked for and not here (FP8, overlapped communication, context parallelism) is refused.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "transformer_engine"


def install() -> None:
    """``transformer_engine`` is this from here on, in this process: before Megatron is imported. Idempotent.

    Raises:
        RuntimeError: the real one is imported already.
    """
    if getattr(sys.modules.get(_NAME), "__spec__", None) is not None:
        if sys.modules[_NAME].__doc__ == __doc__:
            return
        raise RuntimeError(f"the planner comes too late: {sys.modules[_NAME]} is imported")
    sys.modules["transformer_engine_torch"] = None  # type: ignore[assignment]  # the real one's kernels
    for name, names in _modules().items():
        full_name = f"{_NAME}.{name}".rstrip(".")
        module = ModuleType(full_name, __doc__)
        module.__spec__ = ModuleSpec(full_name, None, is_package=True)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[full_name] = module
        parent, _, child = full_name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _modules() -> dict[str, dict[str, Any]]:
    """Modules, parents first, and what is in them."""
    from megatron_tiling.plan.transformer_engine import (
        attention,
        grouped_linear,
        kernels,
        linear,
        norms,
        optimizers,
        refused,
        tokens,
    )

    def of(module: ModuleType, *names: str) -> dict[str, Any]:
        return {name: getattr(module, name) for name in names}

    fp8 = of(refused, "FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")
    layers = of(linear, "Linear", "LayerNormLinear") | of(norms, "LayerNorm", "RMSNorm")
    layers |= of(grouped_linear, "GroupedLinear") | of(attention, "DotProductAttention")
    recompute = "activation_recompute_forward", "is_fp8_activation_recompute_enabled", "checkpoint"
    return {
        "": {"__version__": "2.17.1", "__file__": __file__},
        "common": {},
        "common.recipe": refused.RECIPES,
        "pytorch": layers | fp8 | of(refused, "Fp8Padding", "Fp8Unpadding", "LayerNormMLP"),
        "pytorch.fp8": fp8,
        "pytorch.ops": of(refused, "Sequential", "FusibleOperation"),
        "pytorch.tensor": of(refused, "QuantizedTensor"),
        "pytorch.distributed": of(refused, "CudaRNGStatesTracker", *recompute),
        "pytorch.module": {},
        "pytorch.module.base": of(kernels, "get_dummy_wgrad") | of(linear, "TransformerEngineBaseModule"),
        "pytorch.cpp_extensions": of(grouped_linear, "general_gemm", "general_grouped_gemm"),
        "pytorch.attention": of(attention, "DotProductAttention"),
        "pytorch.attention.rope": of(attention, "apply_rotary_pos_emb", "apply_fused_qkv_rotary_pos_emb"),
        "pytorch.cross_entropy": of(tokens, "parallel_cross_entropy"),
        "pytorch.permutation": of(tokens, *(name for name in vars(tokens) if name.startswith("moe_"))),
        "pytorch.router": of(tokens, *(name for name in vars(tokens) if name.startswith("fused_"))),
        "pytorch.optimizers": of(
            optimizers, "FusedAdam", "FusedSGD", *(name for name in vars(optimizers) if name.startswith("multi_tensor"))
        ),
    }

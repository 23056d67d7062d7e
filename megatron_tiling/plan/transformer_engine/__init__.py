"""TransformerEngine 2.17.1 for the planner: modules that allocate and keep what the real ones do, of fake tensors.

The real one's functions do not take fake tensors, and a machine that plans need not have it. Nothing is computed:
products are torch's, so that their time can be priced; the results of other kernels are empty. Docstrings name the file
upstream and list what is kept for the backward pass ("Keeps"), and what is made and freed beside results ("Makes").
``T`` is a rank's tokens; what has no dtype is in that of the activations.

What is asked for and not here (other recipes of FP8, overlapped communication, context parallelism) is refused.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
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
    from megatron_tiling.plan.transformer_engine import fp8

    sys.modules["transformer_engine_torch"] = fp8.KERNELS
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
        fp8,
        fp8_gather,
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

    state = of(fp8, "FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")
    saving = of(fp8, "QuantizedTensorStorage", "prepare_for_saving", "restore_from_func_ctx")
    names = "FP8FwdTensorIdx", "FP8BwdTensorIdx", "_2X_ACC_FPROP", "_2X_ACC_DGRAD", "_2X_ACC_WGRAD"
    constants = dict(zip(names, (SimpleNamespace(GEMM1_INPUT=0, GEMM1_WEIGHT=1), SimpleNamespace(GRAD_OUTPUT1=0),
                                 False, True, True), strict=True))  # fmt: skip
    layers = of(linear, "Linear", "LayerNormLinear") | of(norms, "LayerNorm", "RMSNorm")
    layers |= of(grouped_linear, "GroupedLinear") | of(attention, "DotProductAttention")
    gathers = "allreduce", "gather_along_first_dim", "reduce_scatter_along_first_dim"
    recompute = "activation_recompute_forward", "is_fp8_activation_recompute_enabled"
    return {
        "": {"__version__": "2.17.1", "__file__": __file__},
        "common": {},
        "common.recipe": refused.RECIPES
        | of(fp8, "Recipe", "Format", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"),
        "debug": {},
        "debug.pytorch": {},
        "debug.pytorch.debug_state": {"TEDebugState": SimpleNamespace(debug_enabled=False)},
        "pytorch": layers | state | of(refused, "Fp8Padding", "Fp8Unpadding", "LayerNormMLP"),
        "pytorch.fp8": state,
        "pytorch.quantization": state,
        "pytorch.constants": {"TE_DType_To_Torch": fp8.FLOAT8} | constants,
        "pytorch.quantized_tensor": saving,
        "pytorch.utils": {"is_non_tn_fp8_gemm_supported": lambda: False},  # on Hopper
        "pytorch.ops": of(norms, "Sequential") | of(refused, "FusibleOperation"),
        "pytorch.tensor": of(refused, "QuantizedTensor"),
        "pytorch.tensor.float8_tensor": of(fp8, "Float8Quantizer", "Float8CurrentScalingQuantizer"),
        "pytorch.tensor.float8_blockwise_tensor": of(fp8, "Float8BlockQuantizer"),
        "pytorch.tensor.storage": {},
        "pytorch.tensor.storage.float8_tensor_storage": of(fp8, "Float8TensorStorage"),
        "pytorch.tensor.storage.float8_blockwise_tensor_storage": of(fp8, "Float8BlockwiseQTensorStorage"),
        "pytorch.distributed": of(refused, "CudaRNGStatesTracker", *recompute)
        | of(fp8_gather, *gathers)
        | of(fp8, "checkpoint"),
        "pytorch.module": {},
        "pytorch.module.base": of(kernels, "get_dummy_wgrad") | of(linear, "TransformerEngineBaseModule") | constants,
        "pytorch.module.linear": {"_check_fp8_reduce_and_update": lambda: True},
        "pytorch.cpp_extensions": of(fp8, "general_gemm") | of(grouped_linear, "general_grouped_gemm"),
        "pytorch.attention": of(attention, "DotProductAttention"),
        "pytorch.attention.rope": of(attention, "apply_rotary_pos_emb", "apply_fused_qkv_rotary_pos_emb"),
        "pytorch.cross_entropy": of(tokens, "parallel_cross_entropy"),
        "pytorch.permutation": of(tokens, *(name for name in vars(tokens) if name.startswith("moe_"))),
        "pytorch.router": of(tokens, *(name for name in vars(tokens) if name.startswith("fused_"))),
        "pytorch.optimizers": of(
            optimizers, "FusedAdam", "FusedSGD", *(name for name in vars(optimizers) if name.startswith("multi_tensor"))
        ),
    }

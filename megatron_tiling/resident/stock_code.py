"""Whether what tiles stand in for is still Megatron's own code, and no other.

The tiled head computes Megatron's loss and never makes the logits; a tiled MLP calls neither its layers nor Megatron's
``MLP.forward``. Where somebody has put other code in the way, that code runs. A function is Megatron's own if its code
lies in the file of its module, under its name: it does not matter who replaced it, on an instance, a class or a module,
before this package came or after. TransformerEngine's ``forward`` is behind decorators, and may lie anywhere in it.
Hazard: a Megatron whose files were edited passes for the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from megatron.core.config_logger import has_config_logger_enabled
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions import fused_cross_entropy
from megatron.core.models.common.language_module import language_module
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import cross_entropy, layers, mappings
from megatron.core.transformer import mlp, multi_token_prediction

SCALE_LOGITS = f"{LanguageModule.__module__}.LanguageModule._scale_logits"
PREDICTION_LOSSES = f"{multi_token_prediction.__name__}.process_mtp_loss"
#: They take logits from the output layer, perhaps scale them, and hand them to the loss; nobody else sees them.
CALLERS = frozenset(
    (
        "megatron.core.models.gpt.gpt_model.GPTModel._postprocess",
        "megatron.core.models.hybrid.hybrid_model.HybridModel.forward",
        "megatron.core.models.mamba.mamba_model.MambaModel.forward",  # to 0.17
        PREDICTION_LOSSES,
    )
)

_LAYERS = ("ColumnParallelLinear", "RowParallelLinear")
_PRODUCTS = (
    *(f"{layer}._forward_impl" for layer in _LAYERS),
    "linear_with_grad_accumulation_and_async_allreduce",
    "linear_with_frozen_weight",
)
_FORWARDS = tuple(f"{layer}.forward" for layer in _LAYERS)
_TRANSFORMER_ENGINE = f"{Path(te.te.__file__).parent}/" if te.HAVE_TE else ""
_REGIONS = tuple(name for name in vars(layers) if name.endswith("_parallel_region"))


def origin(code: CodeType, namespace: Mapping[str, Any]) -> str:
    """``module.qualified_name`` of code that lies in the file of the module it runs in; else ``""``."""
    return f"{namespace['__name__']}.{code.co_qualname}" if code.co_filename == namespace.get("__file__") else ""


def reason_for_whole_logits(model: LanguageModule) -> str:
    """What asks for whole logits between the output layer and the loss of ``model``, or ``""``."""
    config = model.config
    if has_config_logger_enabled(config):
        return "--config-logger-dir writes them"
    if config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl != "native":
        return f"--cross-entropy-fusion-impl {config.cross_entropy_fusion_impl}"
    for found, name in _parts(model):
        if found is not None and not is_stock(found, name):
            return f"{name.rpartition('.')[2]} is not Megatron's own{_place(found)}"
    return replaced_in_layers()


def calls_the_loss(model: LanguageModule) -> bool:
    """Whether the method of ``model`` that hands logits to the loss is Megatron's own."""
    methods = (getattr(model, name, None) for name in ("_postprocess", "forward"))
    return any(is_stock(method, name) for method in methods for name in CALLERS)


def is_stock(function: Any, name: str) -> bool:
    """Whether a function, method or compiled function is Megatron's of this name."""
    function = getattr(function, "_torchdynamo_orig_callable", function)  # of jit_fuser
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    return code is not None and origin(code, function.__globals__) == name


def is_own_function(function: Any) -> bool:
    """Whether a function, or what an autograd function applies, lies in the module and under the name that it says."""
    function = getattr(getattr(function, "__self__", None), "forward", function)
    name = getattr(function, "__qualname__", "")
    return function.__module__.startswith("megatron.core.") and is_stock(function, f"{function.__module__}.{name}")


@torch.compiler.assume_constant_result
def replaced_in_products() -> str:
    """What somebody has replaced of the matrix products in Megatron's own layers, or nothing."""
    return _replaced(layers, _PRODUCTS)


def replaced_in_layers() -> str:
    """What somebody has replaced of Megatron's own layers, for all that a call of theirs does, or nothing."""
    return replaced_in_products() or _replaced(layers, _FORWARDS) or _replaced(mappings, _REGIONS, found_on=layers)


def replaced_in_mlp() -> str:
    """``MLP.forward``, if somebody has replaced it, or nothing."""
    return _replaced(mlp, ("MLP.forward",))


@torch.compiler.assume_constant_result
def replaced_forward(kind: type) -> str:
    """The ``forward`` of a layer's class, or of one that it extends, that somebody has replaced, or nothing."""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if forward is None or base is torch.nn.Module or _is_transformer_engines(forward):
            continue
        if not is_stock(forward, f"{base.__module__}.{base.__qualname__}.forward"):
            return f"has a {base.__name__}.forward that is not its own{_place(forward)}"
    return ""


def _is_transformer_engines(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return te.HAVE_TE and code is not None and code.co_filename.startswith(_TRANSFORMER_ENGINE)


def _replaced(owner: Any, names: Sequence[str], found_on: Any = None) -> str:
    for name in names:
        found = attrgetter(name)(found_on or owner)
        if not is_stock(found, f"{owner.__name__}.{name}"):
            return f"{name} is not Megatron's own{_place(found)}"
    return ""


def _parts(model: LanguageModule) -> Iterator[tuple[Any, str]]:
    """What stands in the place of each function that stock's loss runs through or that sees its logits, and its name.

    ``None`` where this Megatron has none.
    """
    yield _member(LanguageModule, "compute_language_model_loss", found_on=type(model))
    yield getattr(model, "_scale_logits", None), SCALE_LOGITS
    if model.config.cross_entropy_loss_fusion:
        module: Any = fused_cross_entropy
        yield _member(module, "fused_vocab_parallel_cross_entropy", found_on=language_module)
        for step in ("logits_max", "predicted_logits", "cross_entropy_loss", "gradients"):
            yield _member(module, f"calculate_{step}")
    else:
        module = cross_entropy
        yield _member(module, "vocab_parallel_cross_entropy", found_on=language_module.tensor_parallel)
    for name in ("forward", "backward"):
        yield _member(module._VocabParallelCrossEntropy, name)
    for name in vars(cross_entropy.VocabParallelCrossEntropy):
        if not name.startswith("__"):
            yield _member(cross_entropy.VocabParallelCrossEntropy, name)
    if model.config.mtp_num_layers:
        for name in ("_compute_mtp_acceptance_counts", "_vocab_parallel_argmax"):
            yield _member(multi_token_prediction, name)


def _member(owner: Any, name: str, found_on: Any = None) -> tuple[Any, str]:
    path = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    return getattr(owner if found_on is None else found_on, name, None), f"{path}.{name}"


def _place(function: Any) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "" if code is None else f", but of {code.co_filename}, line {code.co_firstlineno}"

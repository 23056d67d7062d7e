"""What a training step is doing, by the names that the planner uses."""

from __future__ import annotations

from types import FrameType, TracebackType
from typing import Any

#: Where the planner cannot tell by a module: parts of the package's and Megatron's paths, and what runs there.
PLACES = {
    "megatron_tiling/tiles/expert": "experts",
    "megatron_tiling/tiles/mlp": "MLP",
    "megatron_tiling/tiles/stepped_mlp": "MLP",
    "megatron_tiling/tiles/head": "logits and loss",
    "megatron_tiling/tiles/scores": "logits and loss",
    "megatron_tiling/tiles/softmax": "logits and loss",
    "megatron_tiling/resident/lazy_logits": "logits and loss",
    "megatron_tiling/resident/lm_head": "logits and loss",
    "megatron/core/tensor_parallel/cross_entropy": "logits and loss",
    "megatron/core/fusions/fused_cross_entropy": "logits and loss",
    "megatron/core/optimizer/": "optimizer step",
    "megatron/core/distributed/finalize_model_grads": "gradient reduction",
    "megatron/core/distributed/param_and_grad_buffer": "gradient reduction",
}
#: Functions that start autograd's engine: torch's, and Megatron's schedules' own.
BACKWARD = ("_engine_run_backward", "custom_backward", "backward_step")


def module_kinds() -> dict[type, str]:
    """What the user calls modules of Megatron's; of a model what is left of it is its head and loss."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer
    from megatron.core.transformer.transformer_block import TransformerBlock

    return {
        Attention: "attention", BaseMoELayer: "experts", MLP: "MLP", LanguageModelEmbedding: "embedding",
        TransformerBlock: "norms and residuals", LanguageModule: "logits and loss",
    }  # fmt: skip


def phase_of(error: BaseException) -> str:
    """What ran when an error was raised, by the frames of its traceback.

    A module that is called is a forward phase, also where the backward pass recomputes. Torch's own backward functions
    have no frames: of those it is "the backward pass".
    """
    kinds = module_kinds()
    place = None
    for frame in _innermost_first(error.__traceback__):
        module: Any = frame.f_locals.get("self")
        for owner, kind in kinds.items():
            if isinstance(module, owner):
                return kind
        file = frame.f_code.co_filename
        place = place or next((phase for part, phase in PLACES.items() if part in file), None)
        if frame.f_code.co_name in BACKWARD:
            return "the backward pass" if place is None else f"{place}, backward"
    return place or "a part of the step that has no name"


def _innermost_first(traceback: TracebackType | None) -> list[FrameType]:
    frames: list[FrameType] = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames[::-1]

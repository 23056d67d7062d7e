"""TiledMLP in FP8: fc1 and fc2 stay TransformerEngine's layers, and one tile loop runs in their place.

The layers keep parameters, quantizers, amax histories and ``_extra_state``. The loop takes the quantizers that a layer
would use in this micro-batch, and they note what they would note there. So checkpoints are those of dense FP8, and a
call that tiles cannot do runs the layers' own ``forward``.

To be imported where TransformerEngine is installed. Older versions of it lack what is imported here and below.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor
from transformer_engine.debug.pytorch.debug_state import TEDebugState
from transformer_engine.pytorch.constants import FP8BwdTensorIdx, FP8FwdTensorIdx
from transformer_engine.pytorch.module.base import _2X_ACC_DGRAD, _2X_ACC_FPROP, _2X_ACC_WGRAD
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from megatron_tiling.config import TilingConfig
from megatron_tiling.resident.activation import activation_of
from megatron_tiling.resident.fp8_loop import FP8Linear, FP8Loop, fp8_mlp
from megatron_tiling.resident.fp8_operands import BLOCK, WeightCopies
from megatron_tiling.resident.mlp import TiledMLP, run_weight_hooks, with_scaled_bias
from megatron_tiling.resident.stock_code import replaced_forward
from megatron_tiling.resident.transformer_engine import TILED_CLASSES, OwnedNorm
from megatron_tiling.tiles.grid import FEATURE_ALIGNMENT, TileGrid
from megatron_tiling.tiles.remade import made_again

#: Recipes that tiles can do -> the features that a tile must be a multiple of.
RECIPES = {Fp8Recipe.delayed: FEATURE_ALIGNMENT, Fp8Recipe.tensorwise: FEATURE_ALIGNMENT, Fp8Recipe.blockwise: BLOCK}


class TiledFP8MLP(TiledMLP):
    """``MLP`` over TransformerEngine's layers whose intermediate never exists whole, in FP8.

    Communication is TransformerEngine's: with sequence parallelism inputs and gradients are gathered in FP8. The output
    of a fused norm is made again, as without FP8, but with delayed scaling, which would not quantize it so again.

    Attributes:
        parts: boundaries ``(0, ..., f)`` of the tiles over the rank's intermediate features.
        fp32_accumulate: sum over tiles in float32.
        holds_weights: keep FP8 copies of weights over the micro-batches of an optimizer step, as TransformerEngine's
            layers do; else they are made for each micro-batch, in the backward pass a tile at a time.
    """

    takes_adapters = False
    parts: list[int]
    fp32_accumulate: bool
    holds_weights: bool
    _norm: OwnedNorm | None
    _copies: dict[str, list[WeightCopies]]

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> output and bias, as stock's MLP."""
        if not hidden_states.numel() or self.reason_for_stock_forward():
            self._copies.clear()  # the layers make theirs
            return MLP.forward(self, hidden_states, per_token_scale, **kwargs)
        bias = self.linear_fc2.bias if self.linear_fc2.te_return_bias else None
        return with_scaled_bias(self._output(hidden_states, per_token_scale), bias, per_token_scale)

    @torch.compiler.disable
    def reason_for_stock_forward(self) -> str:
        """Why a call now would run stock's ``forward`` on TransformerEngine's layers, or nothing."""
        return reason_in_recipe() or super().reason_for_stock_forward()

    def _reason_in_class(self, layer: Any, tiled_classes: tuple[type, ...]) -> str:
        if type(layer) not in TILED_CLASSES or "forward" in vars(layer):
            return "is not a layer of TransformerEngine's any more"
        return replaced_forward(type(layer))

    @torch.compiler.disable
    def _output(self, hidden_states: Tensor, per_token_scale: Tensor | None) -> Tensor:
        """fc1, activation and fc2, with their communication."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        for layer in (fc1, fc2):
            run_weight_hooks(layer)
        normalized = self._normalized(hidden_states)
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        remake = normalized is not hidden_states and not recipe.delayed()
        remade = made_again(normalized, self._normalized, hidden_states) if remake else nullcontext()
        with fc1.prepare_forward_ctx(normalized) as x, fc2.prepare_forward_ctx(normalized), remade:
            tiles = len(self.parts) - 1
            loop = FP8Loop(
                parts=self.parts,
                activation=activation_of(self, scaled=per_token_scale is not None),
                keep=tiles if self.keep is None else self.keep,
                fp32_accumulate=self.fp32_accumulate,
                fc1=self._linear("linear_fc1", save_input=remake or getattr(fc1, "save_original_input", False)),
                fc2=self._linear("linear_fc2"),
                split_accumulators=split_accumulators(recipe),
            )
            bias = fc1.bias if fc1.te_return_bias else None
            return fp8_mlp(x, fc1.weight, bias, fc2.weight, per_token_scale, loop)

    def _normalized(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self._norm is None else self._norm(self.linear_fc1, hidden_states)

    def _linear(self, name: str, save_input: bool = False) -> FP8Linear:
        """A layer as its own ``forward`` would run it now, and that it has run."""
        layer = getattr(self, name)
        forward, backward = (layer.quantizers[key] for key in ("scaling_fwd", "scaling_bwd"))
        quantizers = [forward[FP8FwdTensorIdx.GEMM1_WEIGHT]]
        self._copies[name] = copies_of(layer, quantizers, self._copies.get(name), self.holds_weights)
        return FP8Linear(
            input=forward[FP8FwdTensorIdx.GEMM1_INPUT],
            grad_output=backward[FP8BwdTensorIdx.GRAD_OUTPUT1],
            weight=self._copies[name][0],
            fuse_wgrad=layer.fuse_wgrad_accumulation,
            group=layer.tp_group if layer.parallel_mode is not None and layer.tp_size > 1 else None,
            sequence_parallel=layer.sequence_parallel,
            save_input=save_input,
        )


class TiledFP8SharedExpertMLP(SharedExpertMLP, TiledFP8MLP):
    """``SharedExpertMLP`` on top of ``TiledFP8MLP``."""


FP8_MLP_CLASSES: dict[type[MLP], type[TiledFP8MLP]] = {MLP: TiledFP8MLP, SharedExpertMLP: TiledFP8SharedExpertMLP}


def aligned(grid: TileGrid, config: Any) -> TileGrid:
    """A grid of fc2 whose tiles are cut where the recipe allows, if they can be."""
    return replace(grid, alignment=RECIPES.get(config.fp8_recipe, FEATURE_ALIGNMENT))


def reason_for_no_fp8_tiles(mlp: Any, grid: TileGrid) -> str:
    """Why an MLP over TransformerEngine's layers cannot run FP8 in these tiles of fc2, or nothing."""
    if any(part % grid.alignment for part in grid.in_parts) and mlp.config.fp8_recipe in RECIPES:
        cuts = f"{grid.in_features} features make no {grid.in_splits} tiles of multiples of {grid.alignment}"
        return f"{_recipe(mlp.config)}: {cuts}"
    return reason_in_options(mlp.config)


def reason_in_options(config: Any) -> str:
    """Why nothing of a model can run in FP8 tiles, or nothing."""
    if config.fp8_recipe not in RECIPES:
        return f"{_recipe(config)}: FP8 tiles know {', '.join(known.value for known in RECIPES)}"
    return "FP8 tiles have the operands of Hopper GPUs alone" if is_non_tn_fp8_gemm_supported() else ""


def _recipe(config: Any) -> str:
    return f"--fp8-recipe {Fp8Recipe(config.fp8_recipe).value}"


def convert_fp8_mlp(mlp: Any, grid: TileGrid, config: TilingConfig) -> None:
    """Turn a stock MLP over TransformerEngine's layers into a ``TiledFP8MLP``, in place. Its layers stay.

    Args:
        mlp: without a ``reason_for_no_fp8_tiles``.
        grid: fc2's tiles.
        config: the options.
    """
    fc1 = mlp.linear_fc1
    for layer in (fc1, mlp.linear_fc2):
        if config.fuse_wgrad is not None:
            layer.fuse_wgrad_accumulation = config.fuse_wgrad
    mlp.__class__ = FP8_MLP_CLASSES[type(mlp)]
    mlp.parts, mlp.keep = grid.in_parts, config.kept_tiles
    mlp.fp32_accumulate, mlp.holds_weights = config.fp32_accumulate, config.fp8_hold_weights
    mlp._norm = OwnedNorm(fc1) if isinstance(fc1, te.TELayerNormColumnParallelLinear) else None
    mlp._copies = {}


def reason_in_recipe() -> str:
    """Why a call now cannot run in FP8 tiles, whatever is tiled, or nothing."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return "FP8 is off"
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    if not (recipe.delayed() or recipe.float8_current_scaling() or recipe.float8_block_scaling()):
        return f"{type(recipe).__name__} is no recipe of FP8 tiles"
    reasons = {
        "the recipe's backward pass is not in FP8": recipe.backward_override is not None,
        "a CUDA graph is captured": FP8GlobalStateManager.fp8_graph_capturing(),
        "FP8 is calibrated": FP8GlobalStateManager.is_fp8_calibration(),
        "TransformerEngine is debugged": TEDebugState.debug_enabled,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def copies_of(
    layer: Any, quantizers: Sequence[Any], known: list[WeightCopies] | None, holds_weights: bool
) -> list[WeightCopies]:
    """Of a layer's weights, of which there are ``quantizers``; new ones in an optimizer step's first micro-batch."""
    is_first = layer.disable_parameter_transpose_cache or layer.is_first_microbatch
    layer.is_first_microbatch = False
    if known and not is_first:
        return known
    layer._fp8_workspaces.clear()  # or a call that runs the layer's forward would take old copies
    hold = holds_weights and not layer.disable_parameter_transpose_cache
    return [WeightCopies(quantizer, hold) for quantizer in quantizers]


def split_accumulators(recipe: Any) -> tuple[bool, bool, bool]:
    """Of the recipe's products: forward, input gradients, weight gradients."""
    defaults = {"fprop": _2X_ACC_FPROP, "dgrad": _2X_ACC_DGRAD, "wgrad": _2X_ACC_WGRAD}
    products = {name: getattr(recipe, f"fp8_gemm_{name}", None) for name in defaults}
    fprop, dgrad, wgrad = (
        defaults[name] if product is None else product.use_split_accumulator for name, product in products.items()
    )
    return fprop, dgrad, wgrad

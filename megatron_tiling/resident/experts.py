"""Experts in grouped GEMMs, computed tile by tile: ``TEGroupedMLP``, and megatron-core 0.16's ``GroupedMLP``.

Built experts become tiled in place: their class is set, nothing is drawn or copied. Parameters and checkpoints stay
stock's, and so do dispatchers, padding and capacity, which come before and after. fc1 and fc2 of TransformerEngine stay
what they are and are not called; whatever the loop cannot do for them makes a call run stock's ``forward``.
"""

import copy
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.moe import experts as stock
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from megatron_tiling.config import TilingConfig
from megatron_tiling.resident.activation import FORMULA_KINDS, PassOn, has_own_fused, reason_in_activation
from megatron_tiling.resident.adapters import unwrapped
from megatron_tiling.resident.dispatch import RememberingDispatcher, can_remember, remember
from megatron_tiling.resident.mlp import MLP_LAYERS, reason_in_hooks, run_weight_hooks
from megatron_tiling.resident.stock_code import is_own_function, replaced_forward
from megatron_tiling.resident.transformer_engine import reason_to_stay_dense
from megatron_tiling.tiles.activation import Activation, Formula
from megatron_tiling.tiles.device import on_gpu
from megatron_tiling.tiles.expert_groups import Group, expert_groups
from megatron_tiling.tiles.expert_loop import ExpertsLoop
from megatron_tiling.tiles.expert_products import GroupedGemm, Products, one_by_one
from megatron_tiling.tiles.experts import Source, tiled_experts
from megatron_tiling.tiles.grid import tiles_worth_it


def _known_grouped_gemm() -> Callable[..., Any] | None:
    """TransformerEngine's, where its version has the one whose arguments are known here."""
    try:
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
    except ImportError:
        return None
    return general_grouped_gemm if "quantization_params" in signature(general_grouped_gemm).parameters else None


GROUPED_GEMM = _known_grouped_gemm() if te.HAVE_TE else None


class Weights(NamedTuple):
    """Parameters of the local experts, and biases, one an expert or none."""

    fc1: Sequence[Tensor]
    fc2: Sequence[Tensor]
    fc1_biases: Sequence[Tensor] = ()
    fc2_biases: Sequence[Tensor] = ()


class TiledExperts(torch.nn.Module):
    """Grouped experts whose intermediate never exists whole, put before the stock class; made by ``convert_experts``.

    Attributes:
        tiles: at most so many groups of experts, with about as many rows each; an expert with more is cut.
        keep: so many tiles keep their pre-activations for the backward pass, the others recompute their fc1 product;
            ``None`` is all of them.
        fewer_if_small: where all tiles keep theirs, of little work there are fewer tiles.
        fp32_accumulate: sum over tiles in float32.
        _dispatcher: knows the tokens that rows are copies of, which are kept in their place.
        fuse_wgrad: whether weight gradients go into ``main_grad``; ``None`` follows the layers' own setting.
    """

    config: Any
    num_local_experts: int
    activation_func: Any
    tiles: int
    keep: int | None
    fewer_if_small: bool
    fp32_accumulate: bool
    fuse_wgrad: bool | None
    _dispatcher: RememberingDispatcher | None = None

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        *buffers: Tensor | None,
        **named_buffers: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[n, h]``, sorted by expert, and ``[n]`` -> ``[n, h_out]`` and no bias, as stock's."""
        hidden, scale, rows = permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist()
        source = None if self._dispatcher is None else self._dispatcher.source_of(hidden)
        if self.reason_for_stock_forward(hidden, scale, rows, (*buffers, *named_buffers.values())):
            self.before_stock_forward()
            operands = hidden, tokens_per_expert, scale, *buffers
            result: tuple[Tensor, Tensor | None] = super().forward(*operands, **named_buffers)
            return result
        if self.config.moe_apply_probs_on_input:
            if self.config.moe_router_topk != 1:
                raise ValueError("moe_apply_probs_on_input only works with moe_router_topk=1")
            hidden, scale = (scale.unsqueeze(-1) * hidden).to(hidden.dtype), torch.ones_like(scale)
        weights = self.weights()
        output = self._run_loop(hidden, scale, rows, weights, source)
        if weights.fc2_biases:
            output = stock.TEGroupedMLP._apply_bias(output, weights.fc2_biases, rows, scale.unsqueeze(-1))
        return output, None

    @torch.compiler.disable
    def reason_for_stock_forward(
        self, hidden: Tensor, scale: Tensor, rows: list[int], buffers: Sequence[Tensor | None]
    ) -> str:
        """Why a call now would run stock's ``forward``, or nothing."""
        if any(buffer is not None for buffer in buffers):
            return "others give the memory of outputs"
        if torch.is_autocast_enabled(hidden.device.type):
            return "autocast is on"
        if _has_any_global_hook():
            return "there are hooks for all modules"
        if hidden.dim() != 2 or hidden.shape[0] != sum(rows):
            return "there are rows of no expert"
        if scale.shape != hidden.shape[:1]:
            return "probabilities are not one a row"
        if reason := self.reason_in_layers():
            return reason
        weights = self.weights()
        if any(weight.dtype != hidden.dtype or not weight.is_contiguous() for weight in (*weights.fc1, *weights.fc2)):
            return "weights are of another dtype than inputs, or not contiguous"
        if any(len({weight.requires_grad for weight in layer}) > 1 for layer in weights):
            return "some experts are frozen, others are not"
        return ""

    def reason_in_layers(self) -> str:
        """Why the layers' own ``forward`` must be called, or nothing."""
        return ""

    @torch.compiler.disable
    def _run_loop(
        self, hidden: Tensor, scale: Tensor, rows: list[int], weights: Weights, source: Source | None
    ) -> Tensor:
        fc1, fc2 = (self.of_experts(layer) for layer in MLP_LAYERS)
        features = fc2(weights.fc2)[0].shape[1]
        groups = self.groups(rows, features)
        is_kept = source is None and all(group.keeps_all for group in groups)
        loop = ExpertsLoop(
            groups=groups,
            features=features,
            activation=Activation(self.config.gated_linear_unit, self.activation(), self.formula()),
            products=self.products(hidden, recomputes=not is_kept),
            fuse_wgrad=self.own_fuse_wgrad() if self.fuse_wgrad is None else self.fuse_wgrad,
            fp32_accumulate=self.fp32_accumulate,
            fc1_of_experts=fc1,
            fc2_of_experts=fc2,
        )
        return tiled_experts(hidden.contiguous(), scale, weights.fc1, weights.fc1_biases, weights.fc2, loop, source)

    def before_stock_forward(self) -> None:
        """Of this call."""

    def weights(self) -> Weights:
        raise NotImplementedError

    def of_experts(self, layer: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Makes ``[out, in]`` of each expert out of tensors shaped as the parameters of fc1 or fc2."""
        return list

    def activation(self) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        """What stands between fc1 and fc2 in stock's ``forward``: that very code."""
        raise NotImplementedError

    def formula(self) -> Formula | None:
        """The same for GPU kernels, if they know it."""
        raise NotImplementedError

    def groups(self, rows: list[int], features: int) -> list[Group]:
        if self.keep is not None:
            return expert_groups(rows, features, self.tiles, self.keep)
        tiles = self.tiles
        if self.fewer_if_small:
            out, hidden = shard_shape(self)
            tiles = tiles_worth_it(sum(rows), (out + features) * hidden, tiles)
        return expert_groups(rows, features, tiles, tiles)

    def products(self, hidden: Tensor, recomputes: bool) -> Products:
        return Products(self.gemm() if on_gpu(hidden) else one_by_one)

    def gemm(self) -> GroupedGemm:
        """Of experts on a GPU."""
        return one_by_one

    def own_fuse_wgrad(self) -> bool:
        return bool(self.config.gradient_accumulation_fusion)


class TiledTEGroupedMLP(TiledExperts, stock.TEGroupedMLP):
    """``TEGroupedMLP`` in tiles."""

    def reason_in_layers(self) -> str:
        replaced = _replaced(stock.TEGroupedMLP) or _replaced(self, "_apply_bias")
        if reason := replaced or reason_in_activation(self):
            return reason
        if reason := self.reason_in_fp8():
            return reason
        for name in MLP_LAYERS:
            layer = getattr(self, name)
            if reason := _reason_in_class(layer) or reason_in_hooks(layer):
                return f"{name} {reason}"
        return ""

    def reason_in_fp8(self) -> str:
        return "FP8 is on" if te.FP8GlobalStateManager.is_fp8_enabled() else ""

    def weights(self) -> Weights:
        fc1, fc2 = (getattr(self, name) for name in MLP_LAYERS)
        names = range(self.num_local_experts)
        biases = ([getattr(layer, f"bias{i}") for i in names] if layer.use_bias else () for layer in (fc1, fc2))
        return Weights(*([getattr(layer, f"weight{i}") for i in names] for layer in (fc1, fc2)), *biases)

    def _run_loop(self, *operands: Any) -> Tensor:
        for name in MLP_LAYERS:
            run_weight_hooks(getattr(self, name))
        return super()._run_loop(*operands)

    def activation(self) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        def between(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
            alone = copy.copy(self)
            alone.__class__ = stock.TEGroupedMLP
            alone._modules = self._modules | dict.fromkeys(MLP_LAYERS, PassOn())
            alone.activation_recompute = False  # type: ignore[assignment]
            alone.config = copy.copy(self.config)
            alone.config.fp8 = None  # rows are padded, or need it not
            pre = pre if bias is None else pre + bias  # as fc1 does
            output: Tensor = stock.TEGroupedMLP.forward(alone, pre, torch.tensor([pre.shape[0]]), scale)[0]
            return output

        return between

    def formula(self) -> Formula | None:
        config, function, gated = self.config, self.activation_func, self.config.gated_linear_unit
        clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
        if not has_own_fused(stock):
            return None
        if config.bias_activation_fusion:
            if function == F.silu and gated and clamp is None:
                return Formula("silu")
            if function == quick_gelu and gated:
                return Formula("quick_gelu", clamp, offset)
            return None  # stock's code says what it does, if anything
        if function == squared_relu and config.use_fused_weighted_squared_relu:
            return Formula("squared_relu")
        kind = FORMULA_KINDS.get(config.activation_func if gated else function)
        if kind is None:
            return None
        return Formula(kind, clamp, offset) if gated else Formula(kind)

    def gemm(self) -> GroupedGemm:
        return one_by_one if GROUPED_GEMM is None else of_transformer_engine

    def own_fuse_wgrad(self) -> bool:
        layer: Any = self.linear_fc1
        return bool(layer.fuse_wgrad_accumulation)


#: What built experts become.
TILED_CLASSES: dict[type[torch.nn.Module], type[TiledExperts]] = {stock.TEGroupedMLP: TiledTEGroupedMLP}

if hasattr(stock, "GroupedMLP"):  # in 0.16 alone

    class TiledGroupedMLP(TiledExperts, stock.GroupedMLP):
        """``GroupedMLP`` in tiles. Its parameters hold all experts: ``[h, E * halves * f]`` and ``[E * f, h]``."""

        weight1: Tensor
        weight2: Tensor
        activation_func_with_probs: Any

        def weights(self) -> Weights:
            return Weights([self.weight1], [self.weight2])

        def of_experts(self, layer: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
            hidden = self.config.hidden_size
            shape = self.num_local_experts, *((hidden, -1) if layer == "linear_fc1" else (-1, hidden))
            return lambda parameters: [block.t() for block in parameters[0].view(shape)]

        def reason_in_layers(self) -> str:
            return _replaced(stock.GroupedMLP)

        def activation(self) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
            def between(pre: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
                assert bias is None and scale is not None
                output: Tensor = self.activation_func_with_probs(pre, scale.unsqueeze(-1))
                return output

            return between

        def formula(self) -> Formula | None:
            kind = FORMULA_KINDS.get(self.config.activation_func)
            return None if kind is None else Formula(kind)

    TILED_CLASSES[stock.GroupedMLP] = TiledGroupedMLP


def _replaced(owner: Any, name: str = "forward") -> str:
    """A function of a class of Megatron's or of an instance, if somebody has replaced it, or nothing."""
    kind = owner if isinstance(owner, type) else type(owner)
    return "" if is_own_function(getattr(owner, name)) else f"{kind.__name__}.{name} is not Megatron's own"


def _reason_in_class(layer: Any) -> str:
    """Why a layer is none of TransformerEngine's that can be left uncalled, or nothing."""
    if unwrapped(layer) is not layer:
        return "has an adapter around it"
    if type(layer) not in (te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear) or "forward" in vars(layer):
        return f"is not a stock grouped layer but {type(layer).__name__}"
    return replaced_forward(type(layer))


def reason_to_stay_stock(experts: Any) -> str:
    """Why grouped experts cannot become tiled, in FP8 or without, or nothing."""
    if type(experts) not in TILED_CLASSES:
        return f"{type(experts).__name__} is not a stock class of grouped experts"
    if experts.config.activation_func_fp8_input_store:
        return "the activation's input is stored in fp8"
    if not isinstance(experts, stock.TEGroupedMLP):
        unknown = experts.config.activation_func not in FORMULA_KINDS and "tiles do not know its activation function"
        return reason_to_stay_dense(experts, "experts", in_fp8=False) or unknown or ""
    for name in MLP_LAYERS:
        layer = getattr(experts, name)
        if reason := _reason_in_class(layer):
            return f"{name} {reason}"
        if getattr(layer, "single_grouped_weight", False) or getattr(layer, "single_grouped_bias", False):
            return "--moe-single-grouped-weight or --moe-single-grouped-bias: tiles take one parameter an expert"
        if (getattr(layer.weight0, "gtp_remat_size", None) or 1) > 1:
            return "--expert-tensor-parallel-num-weight-shards: tiles need weights whole"
        if reason := reason_to_stay_dense(layer, "experts", in_fp8=False):
            return reason
    return reason_in_activation(experts)


def gathers_rows(dispatcher: Any, config: TilingConfig) -> bool:
    """Whether experts behind this dispatcher gather their rows again: where tiles recompute, and take time anyway."""
    return (
        config.kept_tiles is not None
        and config.kept_tiles < config.splits_of("experts")[1]
        and can_remember(dispatcher)
    )


def convert_experts(experts: Any, config: TilingConfig, dispatcher: Any = None) -> None:
    """Turn built stock experts into tiled ones, in place, where ``reason_to_stay_stock`` has none.

    Args:
        experts: of a Megatron MoE layer, with grouped GEMMs.
        config: how.
        dispatcher: that layer's, for which ``gathers_rows``; or none.
    """
    experts.__class__ = TILED_CLASSES[type(experts)]
    experts.tiles, experts.keep = config.splits_of("experts")[1], config.kept_tiles
    experts.fewer_if_small = config.fewer_if_small("experts")
    experts.fp32_accumulate, experts.fuse_wgrad = config.fp32_accumulate, config.fuse_wgrad
    if dispatcher is not None:
        experts._dispatcher = remember(dispatcher)


def shard_shape(experts: Any) -> tuple[int, int]:
    """``[out, in]`` of one expert's fc1 on this rank."""
    if hasattr(experts, "weight1"):
        hidden, width = experts.weight1.shape
        return width // experts.num_local_experts, hidden
    weight = next((one for one in experts.linear_fc1.parameters() if one.dim() > 1), None)
    return (0, 0) if weight is None else (weight.shape[-2], weight.shape[-1])


def of_transformer_engine(
    out: Sequence[Tensor], a: Sequence[Any], b: Sequence[Any], layout: str, accumulate: bool, **options: bool
) -> None:
    """A ``GroupedGemm``. TransformerEngine names operands in the order of columns."""
    rows = [tensor.shape[0] for tensor in out]
    how = {"layout": layout[::-1], "m_splits": rows, "accumulate": accumulate, **options}
    assert GROUPED_GEMM is not None
    GROUPED_GEMM(list(b), list(a), list(out), [None] * len(rows), out[0].dtype, **how)

"""TiledMLP: Megatron's MLP with fc1 tile -> activation -> fc2 tile as one loop.

A built MLP becomes tiled in place, once its two linear layers are tiled layers with matching grids: its class is
set, nothing is drawn or copied. The children stay what they are, for checkpoints, optimizers and adapters; their
``forward`` is not called, so the loop runs their pre-hooks itself, and whatever it cannot do for them (other hooks,
other adapters than ``adapters.py`` knows) makes a call run stock's ``forward`` on the tiled layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from megatron_tiling.resident.activation import activation_of, reason_in_activation
from megatron_tiling.resident.adapters import looped_adapter, reason_outside_loop, unwrapped
from megatron_tiling.resident.comm import comm_of, reduced
from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.resident.stepped import reason_in_group
from megatron_tiling.resident.stock_code import replaced_in_layers, replaced_in_mlp
from megatron_tiling.resident.transformer_engine import TILED_CLASSES as TILED_TE_CLASSES
from megatron_tiling.tiles.device import in_capture
from megatron_tiling.tiles.grid import TileGrid, tiles_worth_it
from megatron_tiling.tiles.mlp import LowRank, MLPLoop, adapted_mlp
from megatron_tiling.tiles.remade import made_again
from megatron_tiling.tiles.step_comm import Transport, steps_for
from megatron_tiling.tiles.stepped_mlp import SteppedLoop, stepped_mlp

MLP_LAYERS = ("linear_fc1", "linear_fc2")
_TE_CLASSES = {dim: tuple(tiled for tiled in TILED_TE_CLASSES.values() if tiled.partition_dim == dim) for dim in (0, 1)}


class TiledMLP(MLP):
    """``MLP`` whose intermediate never exists whole. Made from a built MLP by ``convert_mlp``.

    The output and its gradients are those of ``MLP``; the collectives are those of the dense MLP, one in the forward
    pass and one in the backward pass (with sequence parallelism also the gather of the input, once in each).

    Attributes:
        keep: so many tiles keep their pre-activations for the backward pass, the others recompute their fc1 product;
            ``None`` is all of them. The output of a norm that TransformerEngine fuses with fc1 is always made again.
        overlap_steps: in at most so many steps of tokens communication runs behind products, where a call can do so.
            Then ``keep`` is ``None`` or 0, and collectives are those of ``tiles/step_comm.py``.
        least_overlap_tokens: of all ranks; a call of fewer goes by tiles.
        transport: what bytes move with then.
    """

    child_classes: tuple[tuple[type, ...], tuple[type, ...]] = (
        (TiledColumnParallelLinear, *_TE_CLASSES[0]),
        (TiledRowParallelLinear, *_TE_CLASSES[1]),
    )
    #: Whether the loop computes LoRA along.
    takes_adapters = True
    keep: int | None
    overlap_steps: int | None = None
    least_overlap_tokens: int = 0
    transport: Transport = "auto"

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> output and bias, as stock's MLP."""
        if self.reason_for_stock_forward():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        fc2 = unwrapped(self.linear_fc2)
        low, bias = None, fc2.bias
        if (steps := self.steps_now(hidden_states, per_token_scale)) > 1:
            output = self._in_steps(hidden_states, steps)
        else:
            product, low = self._product(hidden_states, per_token_scale)
            output = reduced(fc2, product)
        if low is not None:
            adapter = looped_adapter(self.linear_fc2)
            assert adapter is not None
            output = output + adapter.widened(low).reshape(output.shape)
        if bias is not None and not fc2.skip_bias_add:
            return output + bias, None
        return with_scaled_bias(output, bias, per_token_scale)

    @torch.compiler.disable
    def reason_for_stock_forward(self) -> str:
        """Why a call now would run stock's ``forward`` on the tiled layers, or nothing."""
        if torch.is_autocast_enabled(next(self.parameters()).device.type):
            return "autocast is on"
        if _has_any_global_hook():
            return "there are hooks for all modules"
        if reason := replaced_in_mlp() or replaced_in_layers() or reason_in_activation(self):
            return reason
        for name, tiled_classes in zip(MLP_LAYERS, self.child_classes, strict=True):
            child = getattr(self, name)
            layer = unwrapped(child)
            reason = self._reason_in_class(layer, tiled_classes) or self._reason_in_hooks(layer)
            if child is layer and getattr(layer, "return_layernorm_output", False):
                reason = reason or "returns its norm's output too"
            if reason := reason or self.reason_in_adapter(child):
                return f"{name} {reason}"
        return ""

    @classmethod
    def reason_in_adapter(cls, child: Any) -> str:
        """Why the loop cannot compute the adapter around a layer, if there is one, or nothing."""
        if unwrapped(child) is child:
            return ""
        if not cls.takes_adapters:
            return "has an adapter around it"
        reason = reason_outside_loop(child, cls._reason_in_hooks)
        return reason and f"has an adapter around it that runs by itself: {reason}"

    @classmethod
    def reason_in_grids(cls, config: Any, fc1: TileGrid, fc2: TileGrid) -> str:
        """Why tile i of fc1 and tile i of fc2 do not make one tile of an MLP, or nothing."""
        if fc1.in_splits != 1 or fc2.out_splits != 1 or fc1.out_splits != fc2.in_splits:
            return f"the grids fc1={fc1} and fc2={fc2} do not match: they must be 1xN and Nx1"
        if fc1.out_features != (2 if config.gated_linear_unit else 1) * fc2.in_features:
            return f"fc1 has {fc1.out_features} features, fc2 takes {fc2.in_features}"
        return ""

    def adopt_tiles(self) -> None:
        """Make ready for the loop, once the class is set. Resident tiles are views: there is nothing to do."""

    def _reason_in_class(self, layer: Any, tiled_classes: tuple[type, ...]) -> str:
        """Why a layer's own ``forward`` must be called, or nothing."""
        tiled_class = next((base for base in type(layer).__mro__ if base in tiled_classes), None)
        for method in ("forward", "_forward_impl"):
            if method in vars(layer) or getattr(type(layer), method) is not getattr(tiled_class, method, None):
                return "is not a tiled layer any more"
        reason: str = layer.reason_to_be_called()
        return reason

    @classmethod
    def _reason_in_hooks(cls, child: torch.nn.Module) -> str:
        return reason_in_hooks(child)

    @torch.compiler.disable
    def steps_now(self, hidden_states: Tensor, per_token_scale: Tensor | None) -> int:
        """In how many steps of tokens a call now goes, with communication behind products; 1: without."""
        if self.overlap_steps is None or per_token_scale is not None or reason_for_no_overlap(self) or in_capture():
            return 1
        comm, fc2 = comm_of(self.linear_fc1), self.linear_fc2
        if comm is None or comm.sequence_parallel != fc2.sequence_parallel or comm.group is not fc2.tp_group:
            return 1
        tokens = comm.shards * hidden_states[..., 0].numel()
        return steps_for(tokens, self.overlap_steps, self.least_overlap_tokens)

    @torch.compiler.disable
    def _in_steps(self, hidden_states: Tensor, steps: int) -> Tensor:
        """fc1, activation and fc2 with all of their communication."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        for child in (fc1, fc2):
            run_weight_hooks(child)
        comm = comm_of(fc1)
        assert comm is not None
        loop = SteppedLoop(
            activation=activation_of(self, scaled=False),
            steps=steps,
            keeps=self.keep is None,
            comm=comm,
            fuse_fc1_wgrad=fc1.gradient_accumulation_fusion,
            fuse_fc2_wgrad=fc2.gradient_accumulation_fusion,
            fp32_accumulate=fc1.fp32_accumulate,
            transport=self.transport,
        )
        normalized = fc1.normalized(hidden_states)
        with made_again(normalized, fc1.normalized, hidden_states):
            return stepped_mlp(normalized, fc1.weight, fc1.bias, fc2.weight, loop)

    @torch.compiler.disable
    def _product(self, hidden_states: Tensor, per_token_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """fc1, activation and fc2, before the reduction over tensor-parallel ranks; and for an adapter around fc2."""
        fc1, fc2 = unwrapped(self.linear_fc1), unwrapped(self.linear_fc2)
        up, down = looped_adapter(self.linear_fc1), looped_adapter(self.linear_fc2)
        for child in (fc1, fc2, *(adapter.wide for adapter in (up, down) if adapter is not None)):
            run_weight_hooks(child)
        takes_norm = up is not None and up.takes_norm
        gathers = takes_norm and fc1.return_layernorm_output_gathered and fc1.sequence_parallel

        def input_of_tiles(hidden: Tensor) -> Tensor:
            normalized: Tensor = fc1.normalized(hidden)
            return gather_from_sequence_parallel_region(normalized, group=fc1.tp_group) if gathers else normalized

        comm = comm_of(fc1)
        grid = fc2.grid
        if self.keep is None and fc1.fewer_if_small and fc2.fewer_if_small:
            shards = 1 if comm is None else comm.shards
            tokens, weights = shards * hidden_states[..., 0].numel(), fc1.weight.numel() + fc2.weight.numel()
            grid = replace(grid, in_splits=tiles_worth_it(tokens, weights, grid.in_splits))
        parts = grid.in_parts
        loop = MLPLoop(
            parts=parts,
            activation=activation_of(self, scaled=per_token_scale is not None),
            keep=len(parts) - 1 if self.keep is None else self.keep,
            fuse_fc1_wgrad=fc1.gradient_accumulation_fusion,
            fuse_fc2_wgrad=fc2.gradient_accumulation_fusion,
            fuse_up_wgrad=up is not None and up.fuses_wgrad,
            fuse_down_wgrad=down is not None and down.fuses_wgrad,
            fp32_accumulate=fc1.fp32_accumulate,
            comm=None if gathers else comm,
        )
        normalized = input_of_tiles(hidden_states)
        with made_again(normalized, input_of_tiles, hidden_states):
            low = None if up is None else up.low(normalized if takes_norm else hidden_states)
            wide = (None if adapter is None else adapter.wide.weight for adapter in (up, down))
            adapters = LowRank(low, *wide)
            return adapted_mlp(normalized, fc1.weight, fc1.bias, fc2.weight, per_token_scale, adapters, loop)


class TiledSharedExpertMLP(SharedExpertMLP, TiledMLP):
    """``SharedExpertMLP`` on top of ``TiledMLP``."""


TILED_MLP_CLASSES: dict[type[MLP], type[TiledMLP]] = {MLP: TiledMLP, SharedExpertMLP: TiledSharedExpertMLP}


def convert_mlp(
    mlp: Any,
    keep: int | None = None,
    classes: Mapping[type[MLP], type[TiledMLP]] = TILED_MLP_CLASSES,
    overlap_steps: int | None = None,
    least_overlap_tokens: int = 0,
) -> str:
    """Turn a built stock MLP with tiled layers into a ``TiledMLP``, in place; parameters stay the same objects.

    Args:
        mlp: a Megatron MLP.
        keep: how many tiles keep their pre-activations (0: least memory); ``None`` is all of them.
        classes: what a stock class becomes: ``PARTITIONED_MLP_CLASSES`` over partitioned layers.
        overlap_steps, least_overlap_tokens: as of ``TiledMLP``.

    Returns:
        Nothing, or why this MLP stays as it is.

    Raises:
        ValueError: there are fewer tiles than ``keep``, or it is not all or none of them with ``overlap_steps``.
    """
    if overlap_steps is not None and keep not in (None, 0):
        raise ValueError(f"--tiled-mlp-keep {keep} with --tiled-tp-overlap {overlap_steps}: give all or 0")
    tiled_class = classes.get(type(mlp), TiledMLP)
    layers: list[Any] = [unwrapped(getattr(mlp, name, None)) for name in MLP_LAYERS]
    pairs: Any = zip(layers, tiled_class.child_classes, strict=True)
    grids: list[Any] = [layer.grid if isinstance(layer, kinds) else None for layer, kinds in pairs]
    if reason := reason_to_stay_stock(mlp, keep, classes, layers, grids):
        return reason
    mlp.__class__ = tiled_class
    mlp.keep, mlp.overlap_steps, mlp.least_overlap_tokens = keep, overlap_steps, least_overlap_tokens
    mlp.adopt_tiles()
    return ""


def reason_to_stay_stock(
    mlp: Any,
    keep: int | None,
    classes: Mapping[type[MLP], type[TiledMLP]],
    layers: Sequence[Any],
    grids: Sequence[TileGrid | None],
) -> str:
    """Why tiles of fc1 and fc2 cannot do the work of this MLP, or nothing.

    Args:
        mlp, keep, classes: as for ``convert_mlp``.
        layers: fc1 and fc2 as they are, or are going to be.
        grids: of their tiles; ``None`` of a layer that stays dense.

    Raises:
        ValueError: they can, but there are fewer of them than ``keep``.
    """
    if type(mlp) not in classes:
        return f"{type(mlp).__name__} is not a stock MLP"
    for name, grid in zip(MLP_LAYERS, grids, strict=True):
        if grid is None:
            return f"{name} is not tiled"
    config, (fc1, fc2), (fc1_grid, fc2_grid) = mlp.config, layers, grids
    assert fc1_grid is not None and fc2_grid is not None
    if reason := classes[type(mlp)].reason_in_grids(config, fc1_grid, fc2_grid):
        return reason
    refusals = {
        "linear_fc1 gathers its output": getattr(fc1, "gather_output", False),  # TransformerEngine's never do
        "linear_fc1 adds its bias itself": _adds_bias(fc1),
        "linear_fc2 splits its input itself": not getattr(fc2, "input_is_parallel", True),
        "--use-te-activation-func": config.use_te_activation_func,
        "the activation's input is stored in fp8": config.activation_func_fp8_input_store,
        "activations are offloaded to the CPU": config.cpu_offloading,
        "--moe-shared-expert-overlap runs fc1 and fc2 apart": (
            isinstance(mlp, SharedExpertMLP) and config.moe_shared_expert_overlap
        ),
    }
    reason = next((reason for reason, applies in refusals.items() if applies), "") or reason_in_activation(mlp)
    if not reason:
        check_keep(keep, fc2_grid.in_splits)
    return reason


def check_keep(keep: int | None, tiles: int, what: str = "fc1 and fc2") -> None:
    """Refuse more kept tiles than there are of an MLP.

    Raises:
        ValueError: naming the limit.
    """
    if keep is not None and not 0 <= keep <= tiles:
        raise ValueError(f"--tiled-mlp-keep {keep}: must be within [0, {tiles}], the tiles of {what}, or all")


def reason_for_no_overlap(mlp: Any) -> str:
    """Why communication never runs behind the products of an MLP, stock or tiled, or nothing."""
    fc1, fc2 = (getattr(mlp, name, None) for name in MLP_LAYERS)
    if any(unwrapped(layer) is not layer for layer in (fc1, fc2)):
        return "an adapter"
    if isinstance(mlp, SharedExpertMLP):
        return "a shared expert"
    return reason_in_group(fc1) or reason_in_group(fc2)


def _adds_bias(layer: Any) -> bool:
    if hasattr(layer, "te_return_bias"):
        return bool(layer.use_bias and not layer.te_return_bias)
    return layer.bias is not None and not layer.skip_bias_add


def with_scaled_bias(
    output: Tensor, bias: Tensor | None, per_token_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of fc2: a bias is left to the caller, as by stock's ``MLP.forward``, unless tokens are scaled."""
    if bias is None or per_token_scale is None:
        return output, bias
    return (output + bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)).to(output.dtype), None


def reason_in_hooks(child: torch.nn.Module) -> str:
    """Why the hooks of a layer ask for a call of its ``forward``, or nothing."""
    if child._forward_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "has hooks"
    if not all(_reads_no_input(hook) for hook in child._forward_pre_hooks.values()):
        return "has a pre-hook that may read its input"
    return ""


def _reads_no_input(hook: Callable[..., Any]) -> bool:
    """Whether a pre-hook is there for the weights: those of Megatron's DDP, which wait for gathered parameters."""
    return getattr(hook, "__module__", "").startswith("megatron.core.distributed.distributed_data_parallel")


@torch.compiler.disable
def run_weight_hooks(child: torch.nn.Module) -> None:
    """Run the pre-hooks that are there for the weights of a layer whose ``forward`` is not called."""
    for hook in list(child._forward_pre_hooks.values()):
        if _reads_no_input(hook):
            hook(child, ())

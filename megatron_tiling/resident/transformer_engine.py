"""TransformerEngine's linear layers, computed tile by tile, for models of ``--transformer-impl transformer_engine``.

A tiled layer *is* the stock layer, as for local ones: a built layer's class is set, and of TransformerEngine's only
``forward`` is replaced. Parameters, state dict, ``isinstance`` and every attribute that others read or set
(``parallel_mode``, ``return_layernorm_output``, ...) are the stock layer's; its options are read at call time.

TENorm, TEDotProductAttention and the layers of grouped experts (see ``experts.py``) stay; TELinear stays dense, and so
do layers with an option that tiles do not honour (``NOT_IN_TILES``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_tiling.arguments import OFFLOADING, Refused, reasons_of_row
from megatron_tiling.config import ROW_MODULES
from megatron_tiling.resident.comm import comm_of, reduced
from megatron_tiling.resident.layers import TiledParallelLinear, check_parts, one_tensor, with_bias
from megatron_tiling.resident.stepped import row_in_steps
from megatron_tiling.resident.stock_code import replaced_forward
from megatron_tiling.tiles.comm import ColumnComm
from megatron_tiling.tiles.grid import TileGrid

if te.HAVE_TE:
    from transformer_engine.pytorch.ops import Sequential

_NOT_IN_TILES = "tiles do not do this"
_LINEARS = ("qkv", "proj", "fc1", "fc2", "experts")


def _offloads(part: str) -> Callable[[Any], tuple[Any, ...]]:
    def allowed(config: Any) -> tuple[Any, ...]:
        parts = getattr(config, "offload_modules", None)
        offloads = getattr(config, "fine_grained_activation_offloading", False) and part in (parts or ())
        return (None,) if offloads else (parts,)

    return allowed


#: Of this one layers may differ, and MLPs have a loop of their own (``fp8.py``).
FP8 = Refused("--fp8-format", _NOT_IN_TILES, names=("fp8",))
#: Options of a model's config that tiles do not honour, and the modules whose layers these options reach. Such a layer
#: stays TransformerEngine's. The output layer is Megatron's own, and none of them reaches it.
NOT_IN_TILES: tuple[tuple[Refused, tuple[str, ...]], ...] = (
    (FP8, _LINEARS),
    (Refused("--fp4-format", _NOT_IN_TILES, names=("fp4",)), _LINEARS),
    (Refused("--delay-wgrad-compute", _NOT_IN_TILES), _LINEARS),
    (Refused("--cpu-offloading-num-layers", _NOT_IN_TILES, names=OFFLOADING), _LINEARS),
    (Refused("--symmetric-ar-type", _NOT_IN_TILES), ROW_MODULES),
    (Refused("--use-transformer-engine-op-fuser", _NOT_IN_TILES), ("fc1", "fc2", "experts")),
    (Refused("--offload-modules", _NOT_IN_TILES, _offloads("qkv_linear")), ("qkv",)),
    (Refused("--offload-modules", _NOT_IN_TILES, _offloads("attn_proj")), ("proj",)),
    (Refused("--offload-modules", _NOT_IN_TILES, _offloads("expert_fc1")), ("experts",)),
    (Refused("--offload-modules", _NOT_IN_TILES, _offloads("moe_act")), ("experts",)),
    (Refused("--overlap-dispatch-backward-with-experts-wgrad", _NOT_IN_TILES), ("experts",)),
    (Refused("--moe-paged-stash", _NOT_IN_TILES), ("experts",)),
    (Refused("--moe-mlp-glu-interleave-size", "tiles take gate and up from two halves"), ("experts",)),
    (Refused("--use-te-activation-func", _NOT_IN_TILES), ("experts",)),
    (Refused("--cache-mla-latents", "it reads the layer's weight and norm"), ("qkv",)),
)


def reason_to_stay_dense(layer: Any, module: str, in_fp8: bool = True) -> str:
    """Why a layer of TransformerEngine's cannot be tiled though its model can, or nothing.

    Args:
        module: which one it is, as flags call it.
        in_fp8: with ``--fp8-format`` this layer is in FP8, and no MLP that is tiled in FP8 runs in its place.
    """
    for row, modules in NOT_IN_TILES:
        if (in_fp8 or row is not FP8) and module in modules and (reason := next(reasons_of_row(layer.config, row), "")):
            return reason
    # Of these the layer knows: a recipe need not match it, and an overlap may be off for experts, fc1 or qkv alone.
    if getattr(layer, "te_quant_params", getattr(layer.config, "quant_recipe", None)) is not None:
        return f"--te-precision-config-file: {_NOT_IN_TILES}"
    overlaps = any(name.startswith("ub_") and value is True for name, value in vars(layer).items())
    return f"--tp-comm-overlap: {_NOT_IN_TILES}" if overlaps else replaced_forward(type(layer))


class OwnedNorm:
    """What the norm in a ``TELayerNormColumnParallelLinear`` does, with the layer's parameters.

    TransformerEngine's norms are operations, which it fuses with others anew at every call. In a ``Sequential`` of
    theirs it does so once, for as long as the call wants gradients, or does not. It does not call a ``forward``
    that somebody has put in the place of theirs: the norm runs by itself then.

    Attributes:
        norm: a ``TENorm``, whose own parameters are replaced.
    """

    def __init__(self, layer: Any) -> None:
        self.norm = te.TENorm(layer.config, layer.weight.shape[1], eps=layer.eps)
        self._fused: dict[bool, torch.nn.Module] = {}

    def __call__(self, layer: Any, input_: Tensor) -> Tensor:
        """``[s, b, h]`` -> the same shape."""
        norm, bias = self.norm, layer.layer_norm_bias
        if norm.weight is not layer.layer_norm_weight or (bias is not None and norm.bias is not bias):
            norm.weight = layer.layer_norm_weight  # the first use, or after a parameter was replaced
            if bias is not None:
                norm.bias = bias
            self._fused.clear()
        run = norm if replaced_forward(type(norm)) else self._in_sequence()
        output: Tensor = run(input_)
        return output

    def _in_sequence(self) -> torch.nn.Module:
        wants_gradients = torch.is_grad_enabled()
        if wants_gradients not in self._fused:
            self._fused[wants_gradients] = Sequential(self.norm)
        return self._fused[wants_gradients]


class TiledTELinear(TiledParallelLinear):
    """What the tiled layers share, put before the stock class; and its options under the names of local layers.

    Attributes:
        module: which one it is, as flags call it, of a layer that a spec asks for.
        bias: ``None`` where TransformerEngine has an empty tensor.
    """

    module = ""
    gather_output = False
    input_is_parallel = True
    parallel_mode: str | None
    sequence_parallel: bool
    tp_group: Any
    tp_size: int
    use_bias: bool
    te_return_bias: bool
    fuse_wgrad_accumulation: bool

    def __init__(self, *args: Any, in_splits: int = 1, out_splits: int = 1, **kwargs: Any) -> None:
        super(TiledParallelLinear, self).__init__(*args, **kwargs)
        self.adopt()
        self.set_tiles(in_splits, out_splits)

    def adopt(self) -> None:
        if not self.use_bias:
            del self.bias
            self.register_parameter("bias", None)

    def set_grid(self, grid: TileGrid, **options: Any) -> None:
        """As for local layers.

        Raises:
            ValueError: a spec asks for this layer, which has an option that tiles do not honour, naming the flag.
        """
        if self.module and (reason := reason_to_stay_dense(self, self.module)):
            raise ValueError(f"the model's spec asks for tiles of {self.module}, with {reason}; leave one of them out")
        super().set_grid(grid, **options)

    def forward(self, input_: Any) -> tuple[Any, ...]:
        """``_tiled``, or what somebody has put in the place of stock's ``forward`` or of what that calls.

        Raises:
            RuntimeError: there is such code, and parts to give to it or to take from it.
        """
        replaced = replaced_forward(next(stock for stock in TILED_CLASSES if isinstance(self, stock)))
        if not replaced:
            return self._tiled(input_)
        if not isinstance(input_, Tensor) or not self.combine_out_splits:
            raise RuntimeError(f"a layer in tiles {replaced}: it takes whole inputs; leave this layer dense")
        output: tuple[Any, ...] = super().forward(input_)
        return output

    def _tiled(self, input_: Any) -> tuple[Any, ...]:
        """What ``forward`` returns, computed tile by tile."""
        raise NotImplementedError

    @property
    def skip_bias_add(self) -> bool:
        return self.te_return_bias or not self.use_bias

    @property
    def explicit_expert_comm(self) -> bool:
        """Whether others communicate: around an expert's layer, or a shared expert's."""
        return self.parallel_mode is None

    @property
    def allreduce_dgrad(self) -> bool:
        return self.parallel_mode == "column" and self.tp_size > 1 and not self.sequence_parallel

    @property
    def gradient_accumulation_fusion(self) -> bool:
        return self.fuse_wgrad_accumulation

    @gradient_accumulation_fusion.setter
    def gradient_accumulation_fusion(self, fuse: bool) -> None:
        self.fuse_wgrad_accumulation = fuse

    def reason_to_be_called(self) -> str:
        in_fp8 = te.FP8GlobalStateManager.is_fp8_enabled()
        return "is in a region of FP8, which it refuses" if in_fp8 else super().reason_to_be_called()

    def _product(self, input_: Any, weight: Tensor, bias: Tensor | None, comm: ColumnComm | None) -> Any:
        """The tile loop.

        Raises:
            RuntimeError: FP8 is on, by a context manager, for it is off in the config.
        """
        if te.FP8GlobalStateManager.is_fp8_enabled():
            raise RuntimeError("a tiled layer does not compute in FP8; leave out fp8_autocast, or the layer dense")
        return super()._product(input_, weight, bias, comm)


class TiledTEColumn(TiledTELinear):
    """Column layers of TransformerEngine."""

    partition_dim = 0
    input_is_already_split = False

    def _tiled(self, input_: Tensor) -> tuple[Any, ...]:
        """``[s, b, h]`` (``[s/tp, b, h]`` under sequence parallelism) -> stock's output, or a list of tiles, and bias.

        Raises:
            ValueError: a list is given.
        """
        return self._column(self.normalized(one_tensor(input_)), comm_of(self))

    def _column(self, input_: Tensor, comm: ColumnComm | None) -> tuple[Any, Tensor | None]:
        output = self._product(input_, self.weight, None if self.te_return_bias else self.bias, comm)
        return output, self.bias if self.te_return_bias else None


class TiledTELayerNormColumn(TiledTEColumn):
    """Column layers of TransformerEngine with a norm before them, whose parameters the layer owns."""

    return_layernorm_output: bool
    return_layernorm_output_gathered: bool

    def adopt(self) -> None:
        super().adopt()
        self._norm = OwnedNorm(self)

    def normalized(self, input_: Tensor) -> Tensor:
        return self._norm(self, input_)

    def _tiled(self, input_: Tensor) -> tuple[Any, ...]:
        """As without a norm; with ``return_layernorm_output`` the norm's output too, where stock has it.

        That of all ranks' tokens with ``return_layernorm_output_gathered``, gathered once for the caller and the tiles.
        """
        if not self.return_layernorm_output:
            return super()._tiled(input_)
        normed = self.normalized(one_tensor(input_))
        gathers = self.return_layernorm_output_gathered and self.sequence_parallel
        if gathers:  # in the backward pass the gradients of both are reduced as one
            normed = gather_from_sequence_parallel_region(normed, group=self.tp_group)
        output, bias = self._column(normed, None if gathers else comm_of(self))
        return (output, bias, normed) if self.te_return_bias else ((output, normed), None)


class TiledTERow(TiledTELinear):
    """Row layers of TransformerEngine."""

    partition_dim = 1
    input_is_already_split = True

    def _tiled(self, input_: Any) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h/tp]``, or its list of in-tiles -> stock's output and bias.

        Raises:
            ValueError: the list's tiles are not the grid's.
        """
        check_parts(self, input_)
        output = None if self.overlap_steps is None else row_in_steps(self, input_)
        if output is None:
            output = reduced(self, self._product(input_, self.weight, None, None))
        return with_bias(output, self.bias, self.te_return_bias)


#: What a built layer becomes; nothing where TransformerEngine is not installed.
TILED_CLASSES: dict[type, type[TiledTELinear]] = {}

if te.HAVE_TE:

    class TiledTEColumnParallelLinear(TiledTEColumn, te.TEColumnParallelLinear):
        """``TEColumnParallelLinear`` in tiles."""

    class TiledTERowParallelLinear(TiledTERow, te.TERowParallelLinear):
        """``TERowParallelLinear`` in tiles."""

    class TiledTELayerNormColumnParallelLinear(TiledTELayerNormColumn, te.TELayerNormColumnParallelLinear):
        """``TELayerNormColumnParallelLinear`` in tiles. Megatron-Bridge looks for that name within this one."""

    TILED_CLASSES |= {
        te.TEColumnParallelLinear: TiledTEColumnParallelLinear,
        te.TERowParallelLinear: TiledTERowParallelLinear,
        te.TELayerNormColumnParallelLinear: TiledTELayerNormColumnParallelLinear,
    }


def spec_classes(module: str, splits: Sequence[int]) -> dict[Any, Any]:
    """``{TransformerEngine's class: the tiled one}`` for a module of a model spec, ``with_splits(*splits)``."""
    return {
        stock: type(tiled.__name__, (tiled.with_splits(*splits),), {"module": module})
        for stock, tiled in TILED_CLASSES.items()
    }

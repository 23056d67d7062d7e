"""Grouped experts in FP8: the loop of ``tiles/experts.py`` with TransformerEngine's quantizers and grouped GEMM.

fc1 and fc2 stay TransformerEngine's layers, as of an MLP in FP8 (``fp8.py``): they keep parameters, quantizers, amax
histories and ``_extra_state``. Each expert has quantizers of its own, and a tile is a group of experts, so that its
operands are parts of dense's:

* Rows are padded first, for all tiles at once, with Megatron's own module, unless the router or the dispatcher does.
* A tile quantizes what each product takes: rows forward, rows and columns of gradients once for both products, columns
  of fc2's inputs, which are made again. Pre-activations are kept in bf16. Of fc1's input its columns are kept, if all
  tiles are; else it is as it is given, or as tokens that its rows are copies of, whose rows and columns take as much in
  FP8. What is quantized again has the scale that it had, and is noted nowhere.
* An expert with more rows than a tile should have is cut by rows, at multiples of a block, not by features: operands of
  TransformerEngine's GEMM are contiguous. With current scaling each cut has a scale of its own, else dense's.
* Weights are quantized as in an MLP, the whole of an expert's at a time. With delayed scaling those of experts without
  rows are noted too, as TransformerEngine does.

To be imported where TransformerEngine is installed. Older versions of it, and of megatron-core, lack what is imported.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import skip_routed_expert_padding
from torch import Tensor
from transformer_engine.pytorch.module.linear import _check_fp8_reduce_and_update
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import prepare_for_saving, restore_from_saved

from megatron_tiling.config import TilingConfig
from megatron_tiling.resident import experts as grouped
from megatron_tiling.resident.fp8 import copies_of, reason_in_options, reason_in_recipe, split_accumulators
from megatron_tiling.resident.fp8_operands import (
    BLOCK,
    Operand,
    Quantizer,
    WeightCopies,
    all_same_again,
    knows_scale,
    split_quantized,
)
from megatron_tiling.resident.mlp import MLP_LAYERS
from megatron_tiling.tiles.expert_groups import Group, Segment, cut_by_rows
from megatron_tiling.tiles.expert_products import Products
from megatron_tiling.tiles.experts import Source


class FP8Products(Products):
    """Of one micro-batch.

    Args:
        quantizers: of the layers, for each kind of rows one an expert.
        copies: of the weights of "fc1" and "fc2".
        split_accumulators: of the recipe's products: forward, input gradients, weight gradients.
        updates_amax: this is the first of the modules in FP8, whose backward pass ends last.
        saves_hidden: keep the columns of fc1's input.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Sequence[Quantizer]],
        copies: Mapping[str, Sequence[WeightCopies]],
        split_accumulators: tuple[bool, bool, bool],
        updates_amax: bool,
        saves_hidden: bool,
    ) -> None:
        super().__init__(self._gemm)
        self.saves_hidden = saves_hidden
        self._inputs: dict[int, list[Operand]] = {}
        self._with_rows: list[Operand] = []  # of these
        self._quantizers, self._copies, self._updates_amax = quantizers, copies, updates_amax
        self._again = {which: all_same_again(quantizers[which]) for which in ("hidden", "activation")}
        self._split_accumulators = dict(zip(("NT", "NN", "TN"), split_accumulators, strict=True))

    def _gemm(
        self, out: Sequence[Tensor], a: Sequence[Operand], b: Sequence[Operand], layout: str, accumulate: bool
    ) -> None:
        options = {"grad": layout != "NT", "use_split_accumulator": self._split_accumulators[layout]}
        grouped.of_transformer_engine(out, a, b, layout, accumulate, **options)

    def rows(
        self,
        which: str,
        tensor: Tensor,
        segments: Sequence[Segment],
        start: int = 0,
        *,
        rowwise: bool = False,
        columnwise: bool = False,
        again: bool = False,
    ) -> Sequence[Operand]:
        saves = self.saves_hidden and which == "hidden"
        if saves and again:
            return self._inputs.pop(segments[0].rows.start)
        self._drop_rows()
        quantizers = (self._again if again else self._quantizers)[which]
        first, last = segments[0].rows.start - start, segments[-1].rows.stop - start
        sizes = [rows.stop - rows.start for _, rows in segments]
        by = [quantizers[expert] for expert, _ in segments]
        operands = split_quantized(by, tensor[first:last], sizes, rowwise=rowwise, columnwise=columnwise or saves)
        if saves:
            self._inputs[segments[0].rows.start] = self._with_rows = operands
        return operands

    def _drop_rows(self) -> None:
        for operand in self._with_rows:
            operand.update_usage(rowwise_usage=False, columnwise_usage=True)
        self._with_rows = []

    def saved(self) -> Sequence[Tensor | None]:
        self._drop_rows()
        tensors: list[Tensor | None] = prepare_for_saving(*chain(*self._inputs.values()))[0]
        return tensors

    def restore(self, tensors: Sequence[Tensor | None]) -> None:
        restore_from_saved(list(chain(*self._inputs.values())), list(tensors))

    def weights(
        self, layer: str, weights: Sequence[Tensor], segments: Sequence[Segment], columnwise: bool
    ) -> Sequence[Operand]:
        copies, everything = self._copies[layer], [slice(0, weights[0].shape[0])]
        layouts = {"rowwise": not columnwise, "columnwise": columnwise}
        return [copies[expert].rows(weights[expert], everything, **layouts) for expert, _ in segments]

    def finish(self) -> None:
        if self._updates_amax:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


class TiledFP8GroupedMLP(grouped.TiledTEGroupedMLP):
    """``TEGroupedMLP`` in tiles, in FP8.

    Attributes:
        holds_weights: as of ``TiledFP8MLP``.
    """

    linear_fc1: Any
    linear_fc2: Any
    quantization_padding: Any
    quantization_unpadding: Any
    holds_weights: bool
    _copies: dict[str, list[WeightCopies]]

    def reason_in_fp8(self) -> str:
        return reason_in_recipe()

    def before_stock_forward(self) -> None:
        self._copies.clear()  # the layers make theirs

    def groups(self, rows: list[int], features: int) -> list[Group]:
        return cut_by_rows(super().groups(rows, features), BLOCK)

    @torch.compiler.disable
    def _run_loop(
        self, hidden: Tensor, scale: Tensor, rows: list[int], weights: grouped.Weights, source: Source | None
    ) -> Tensor:
        unpadded, run = rows, super()._run_loop
        if not skip_routed_expert_padding(self.config):
            hidden, rows = self.quantization_padding(hidden, unpadded)
            scale = self.quantization_padding(scale.unsqueeze(-1), unpadded)[0].squeeze(-1)
            source = source and padded_source(source, unpadded, rows)
        prepare = {"num_gemms": self.num_local_experts}
        with (
            self.linear_fc1.prepare_forward_ctx(hidden, **prepare) as hidden,
            self.linear_fc2.prepare_forward_ctx(hidden, **prepare),
        ):
            output = run(hidden, scale, rows, weights, source)
        if rows != unpadded:
            output = self.quantization_unpadding(output, unpadded)
        return output

    def products(self, hidden: Tensor, recomputes: bool) -> Products:
        quantizers, copies, weights = {}, {}, self.weights()
        of_layers = ("hidden", "pre_grad", weights.fc1), ("activation", "output_grad", weights.fc2)
        for name, (input_, grad, parameters) in zip(MLP_LAYERS, of_layers, strict=True):
            layer: Any = getattr(self, name)
            quantizers[input_], of_weights, *_, quantizers[grad] = layer._get_quantizers()
            self._copies[name] = copies_of(layer, of_weights, self._copies.get(name), self.holds_weights)
            copies[name.removeprefix("linear_")] = self._copies[name]
            for copy, weight in zip(self._copies[name], parameters, strict=True):
                if knows_scale(of_weights[0]):
                    copy.note(weight)
        records = torch.is_grad_enabled() and any(one.requires_grad for one in (hidden, weights.fc1[0], weights.fc2[0]))
        accumulators = split_accumulators(FP8GlobalStateManager.get_fp8_recipe())
        saves = torch.is_grad_enabled() and weights.fc1[0].requires_grad and not recomputes
        return FP8Products(quantizers, copies, accumulators, records and _check_fp8_reduce_and_update(), saves)


def padded_source(source: Source, rows: Sequence[int], padded: Sequence[int]) -> Source:
    """Of padded rows. These repeat an expert's last, which changes no scale, and have no gradient."""
    device, counts = source.indices.device, torch.tensor(rows)
    busy = counts > 0
    last = (counts.cumsum(0) - 1)[busy].to(device)
    repeats = torch.ones_like(source.indices)
    repeats[last] += (torch.tensor(padded) - counts)[busy].to(device)
    return source._replace(indices=source.indices.repeat_interleave(repeats, output_size=sum(padded)))


def reason_for_no_fp8_experts(experts: Any) -> str:
    """Why grouped experts, which could be tiled without FP8, cannot with it, or nothing."""
    missing = grouped.GROUPED_GEMM is None and "TransformerEngine's grouped GEMM is another"
    return reason_in_options(experts.config) or missing or ""


def convert_fp8_experts(experts: Any, config: TilingConfig, dispatcher: Any = None) -> None:
    """As ``convert_experts``, into ``TiledFP8GroupedMLP``, where there is no ``reason_for_no_fp8_experts``."""
    grouped.convert_experts(experts, config, dispatcher)
    experts.__class__ = TiledFP8GroupedMLP
    experts.fewer_if_small = False  # not measured in FP8
    experts.holds_weights, experts._copies = config.fp8_hold_weights, {}

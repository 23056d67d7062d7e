"""What both passes of the loop over tiles of experts share. Depends on torch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.expert_groups import Group, Segment, rows_of
from megatron_tiling.tiles.expert_products import Products, rows_of_each


@dataclass(frozen=True)
class ExpertsLoop:
    """How ``tiled_experts`` runs.

    Args:
        groups: the tiles.
        features: intermediate features of an expert on this rank.
        activation: between fc1 and fc2.
        products: of the experts of a tile; those of an expert some of whose features make a tile are torch's.
        fuse_wgrad: add weight gradients to ``weight.main_grad`` in place, and give autograd none.
        fp32_accumulate: sum the input gradient of an expert in several tiles in float32.
        fc1_of_experts, fc2_of_experts: views ``[halves * f, h]`` and ``[h_out, f]`` of each expert in a sequence of
            tensors shaped as the parameters.
    """

    groups: Sequence[Group]
    features: int
    activation: Activation
    products: Products = field(default_factory=Products)
    fuse_wgrad: bool = False
    fp32_accumulate: bool = False
    fc1_of_experts: Callable[[Sequence[Tensor]], list[Tensor]] = list
    fc2_of_experts: Callable[[Sequence[Tensor]], list[Tensor]] = list


class Parts(NamedTuple):
    """Parameters, or what there is of each of them."""

    fc1: Sequence[Any]
    biases: Sequence[Any]
    fc2: Sequence[Any]

    def like(self, values: Sequence[Any]) -> "Parts":
        """As many values each."""
        fc1, biases = len(self.fc1), len(self.fc1) + len(self.biases)
        return Parts(values[:fc1], values[fc1:biases], values[biases:])

    def of_experts(self, loop: ExpertsLoop) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """fc1, its bias and fc2 of each expert."""
        return loop.fc1_of_experts(self.fc1), list(self.biases), loop.fc2_of_experts(self.fc2)


def fc1_product(
    loop: ExpertsLoop,
    segments: Sequence[Segment],
    hidden: Tensor,
    fc1: list[Tensor],
    pre: Tensor,
    start: int = 0,
    **options: bool,
) -> Sequence[Any]:
    """``pre [n, halves, f]`` of these rows, of an input that begins at row ``start``; the operands of that input."""
    operands = loop.products.rows("hidden", hidden, segments, start, rowwise=True, **options)
    weights = loop.products.weights("fc1", fc1, segments, columnwise=False)
    loop.products.gemm(rows_of_each(pre.flatten(1), segments, segments[0].rows.start), operands, weights, "NT", False)
    return operands


def of_one_bias(segments: Sequence[Segment], biases: list[Tensor]) -> Sequence[Segment]:
    """What the activation takes at once: the rows of one expert, or all of them where there are no biases."""
    if biases:
        return segments
    return [Segment(segments[0].expert, rows_of(segments))]

"""The grouped products of tiled experts, and what they are given: tensors as they are. Depends on torch alone."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from megatron_tiling.tiles.expert_groups import Segment
from megatron_tiling.tiles.gemm import gemm_into

#: ``(out, a, b, layout, accumulate)``: ``out[i] = a[i] @ b[i]``, or ``+=``, in place. The layout says of each operand
#: whether it is transposed: "NT" is ``a[i] @ b[i].T``. Matrices are contiguous, if parameters and inputs of the loop
#: are, and may have no rows.
GroupedGemm = Callable[[Sequence[Tensor], Sequence[Any], Sequence[Any], str, bool], None]
#: Rows of experts: inputs of fc1 and fc2, and the gradients of their outputs.
Rows = Literal["hidden", "activation", "pre_grad", "output_grad"]


def one_by_one(out: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], layout: str, accumulate: bool) -> None:
    """A ``GroupedGemm`` of torch's products."""
    for total, left, right in zip(out, a, b, strict=True):
        left, right = left.t() if layout[0] == "T" else left, right.t() if layout[1] == "T" else right
        gemm_into(total, left, right, accumulate=accumulate)


def rows_of_each(tensor: Tensor, segments: Sequence[Segment], start: int = 0) -> tuple[Tensor, ...]:
    """The rows of each segment of a group, of a tensor that begins at row ``start``."""
    first = segments[0].rows.start - start
    sizes = [rows.stop - rows.start for _, rows in segments]
    return tensor[first : first + sum(sizes)].split_with_sizes(sizes)


class Products:
    """Of one micro-batch.

    Args:
        gemm: multiplies experts of a tile.

    Attributes:
        saves_hidden: keeps what the backward pass wants of fc1's input, which recomputes nothing.
    """

    saves_hidden = False

    def __init__(self, gemm: GroupedGemm = one_by_one) -> None:
        self.gemm = gemm

    def rows(
        self,
        which: Rows,
        tensor: Tensor,
        segments: Sequence[Segment],
        start: int = 0,
        *,
        rowwise: bool = False,
        columnwise: bool = False,
        again: bool = False,
    ) -> Sequence[Any]:
        """Operands of ``gemm``, one a segment.

        Args:
            tensor: ``[n, k]``, begins at row ``start``.
            rowwise: for a product with weights.
            columnwise: for a weight gradient.
            again: the forward pass has used these rows.
        """
        return rows_of_each(tensor, segments, start)

    def weights(
        self, layer: Literal["fc1", "fc2"], weights: Sequence[Tensor], segments: Sequence[Segment], columnwise: bool
    ) -> Sequence[Any]:
        """The same of the experts' weights ``[out, in]``; columnwise for a gradient of an input."""
        return [weights[expert] for expert, _ in segments]

    def saved(self) -> Sequence[Tensor | None]:
        """With ``saves_hidden``: to be saved for the backward pass, and given to ``restore`` there."""
        return ()

    def restore(self, tensors: Sequence[Tensor | None]) -> None:
        """In the backward pass, once."""

    def finish(self) -> None:
        """After the backward pass."""

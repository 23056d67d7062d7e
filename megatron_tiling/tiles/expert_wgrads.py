"""The weight gradients of grouped experts. Depends on torch alone."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from megatron_tiling.tiles.expert_groups import Segment
from megatron_tiling.tiles.wgrad import WeightGrad


class ExpertWeightGrads:
    """The weight gradients of fc1 or fc2, one view an expert."""

    def __init__(
        self, parameters: Sequence[Tensor], of_experts: Callable[[Sequence[Tensor]], list[Tensor]], fuse: bool
    ) -> None:
        fuse = fuse and all(getattr(parameter, "main_grad", None) is not None for parameter in parameters)
        self._grads = [WeightGrad(parameter, fuse) for parameter in parameters]
        self.fused = fuse
        self._filled: set[int] = set()
        self.tensors = of_experts([grad.tensor for grad in self._grads])

    def clear(self, experts: Iterable[int]) -> None:
        """Those of experts without rows."""
        for expert in () if self.fused else experts:
            self.tensors[expert].zero_()

    def of(self, segments: Sequence[Segment]) -> tuple[list[Tensor], bool]:
        """Of these experts, and whether products are to be added to what is there."""
        accumulate = self.fused or segments[0].expert in self._filled  # one whose rows make several tiles
        self._filled.update(expert for expert, _ in segments)
        return [self.tensors[expert] for expert, _ in segments], accumulate

    def results(self) -> list[Tensor | None]:
        return [grad.result() for grad in self._grads]

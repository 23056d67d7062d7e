"""What stock's layers communicate around their products, and what they ask their products to communicate."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_tiling.tiles.comm import ColumnComm


def reduced(row_layer: Any, output: Tensor) -> Tensor:
    """What ``RowParallelLinear.forward`` does with its product, as the layer is set now."""
    return output if row_layer.explicit_expert_comm else summed(row_layer, output)


def summed(row_layer: Any, output: Tensor) -> Tensor:
    """The sum over tensor-parallel ranks: of all tokens, or under sequence parallelism of this rank's."""
    scatters = row_layer.sequence_parallel
    reduce = reduce_scatter_to_sequence_parallel_region if scatters else reduce_from_tensor_model_parallel_region
    result: Tensor = reduce(output, group=row_layer.tp_group)
    return result


def column_comm(group: Any, sequence_parallel: bool, allreduce_dgrad: bool) -> ColumnComm | None:
    """The collectives that stock's column layer asks its product for, if any."""
    if not (sequence_parallel or allreduce_dgrad):
        return None
    return ColumnComm(group, sequence_parallel, allreduce_dgrad, mpu_buffer)


def comm_of(layer: Any) -> ColumnComm | None:
    """The collectives of ``ColumnParallelLinear.forward``, as the layer is set now."""
    if layer.explicit_expert_comm:
        return None
    # Built with sequence parallelism, which was turned off since: stock then copies its input, and sums the gradient.
    copies = not (layer.sequence_parallel or getattr(layer, "disable_grad_reduce", True))
    copies = copies and layer.tp_group is not None and layer.tp_group.size() > 1
    return column_comm(layer.tp_group, layer.sequence_parallel, layer.allreduce_dgrad or copies)


def mpu_buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Megatron's shared gather buffer, the same that stock layers use.

    One that was made in inference mode is replaced: outside of it, copies could not write there.
    """
    memory = get_global_memory_buffer()
    buffer: Tensor = memory.get_tensor(list(shape), dtype, "mpu")
    if buffer.is_inference():
        with torch.inference_mode(False):
            del memory.buffer["mpu", dtype], buffer
            buffer = memory.get_tensor(list(shape), dtype, "mpu")
    return buffer

"""What an FSDP holds gathered at once, and each step's gradient norm, for tests and benchmarks.

``watch()`` wraps the functions with which Megatron-FSDP and torch FSDP2 gather a unit's parameters and let them go. A
unit counts from the call that begins its gather to the one that frees it. Units are tiles, or in a model without
partitioned tiles whole layers; the rest (embeddings, norms, biases, layers left dense) is counted apart.
"""

from typing import Any

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import AllGatherPipeline
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from megatron_tiling.partitioned.modules import TILE_MODULES, tile_modules


class Gathered:
    """What is gathered now, and the most that was.

    Attributes:
        peak_units, peak_bytes: units at once, and their bytes.
        peak_total: bytes at once, with the rest.
        largest: bytes of the largest unit.
    """

    def __init__(self) -> None:
        self.units: dict[Any, dict[Any, int]] = {}
        self.rest: dict[Any, int] = {}
        self.peak_units = self.peak_bytes = self.peak_total = self.largest = 0

    def take(self, unit: Any, part: Any, size: int) -> None:
        """A part of a unit, or of the rest if ``unit`` is None, is gathered, unless it is already."""
        parts = self.rest if unit is None else self.units.setdefault(unit, {})
        parts[part] = size
        sizes = [sum(parts.values()) for parts in self.units.values()]
        self.peak_units = max(self.peak_units, len(sizes))
        self.peak_bytes = max(self.peak_bytes, sum(sizes))
        self.peak_total = max(self.peak_total, sum(sizes) + sum(self.rest.values()))
        self.largest = max(self.largest, *sizes, 0)

    def drop(self, unit: Any, part: Any) -> None:
        parts = self.rest if unit is None else self.units.get(unit, {})
        parts.pop(part, None)
        if unit is not None and not parts:
            self.units.pop(unit, None)

    def __str__(self) -> str:
        return (
            f"gathered at most {self.peak_units} units, {self.peak_bytes} bytes, {self.peak_total} with the rest; "
            f"largest unit {self.largest}"
        )


def watch() -> Gathered:
    """Count from now on, and print each step's gradient norm. To be called before the model is wrapped."""
    gathered = Gathered()
    _watch_megatron_fsdp(gathered)
    _watch_torch_fsdp2(gathered)
    _watch_steps()
    return gathered


def _watch_megatron_fsdp(gathered: Gathered) -> None:
    gather, release = AllGatherPipeline.async_bucket_gather, AllGatherPipeline.release_bucket

    def unit_of(pipeline: Any, bucket: int) -> Any:
        unit = pipeline.buffer.parameter_groups[bucket].fsdp_unit_id
        return None if unit is None else (id(pipeline), unit)

    def counted_gather(self: Any, bucket_id: int, bwd: bool) -> None:
        gather(self, bucket_id, bwd)
        weights = self.buffer.parameter_groups[bucket_id].model_weight_buffer
        size = weights.bucket_index.size * weights.dtype.itemsize
        gathered.take(unit_of(self, bucket_id), (id(self), bucket_id), size)

    def counted_release(self: Any, bucket_id: int, bwd: bool, lazy: bool = False) -> None:
        release(self, bucket_id, bwd, lazy)
        if not lazy:
            gathered.drop(unit_of(self, bucket_id), (id(self), bucket_id))

    AllGatherPipeline.async_bucket_gather, AllGatherPipeline.release_bucket = counted_gather, counted_release


def _watch_torch_fsdp2(gathered: Gathered) -> None:
    unshard, to_sharded = FSDPParamGroup.unshard, FSDPParamGroup._to_sharded

    def unit_of(group: Any) -> Any:
        module = group.modules[0]
        is_layer = isinstance(module, TransformerLayer) and not tile_modules(module)
        return id(group) if is_layer or isinstance(module, TILE_MODULES) else None

    def counted_unshard(self: Any, *args: Any) -> None:
        unshard(self, *args)
        size = sum(param._orig_size.numel() * param.orig_dtype.itemsize for param in self.fsdp_params)
        gathered.take(unit_of(self), id(self), size)

    def counted_to_sharded(self: Any) -> None:
        to_sharded(self)
        gathered.drop(unit_of(self), id(self))

    FSDPParamGroup.unshard, FSDPParamGroup._to_sharded = counted_unshard, counted_to_sharded


def _watch_steps() -> None:
    import megatron.training.training as training

    stock, steps = training.train_step, iter(range(1 << 60))

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of building the model, which is whole before it is sharded
        result = stock(*args, **kwargs)
        print(f"gradient norm: {result[5]:.9g}", flush=True)
        return result

    training.train_step = step

"""Tiles under ZeRO-3 are gathered by hooks of our own, one tile ahead of its use.

DeepSpeed's hooks on a module cost about 1 ms of host time a step, wait for streams, and fetch ahead only as far as
thresholds in elements allow: with many small modules the GPU waits for them. A tile's hooks need to know one thing
only: which tile comes next. All else stays the engine's: partitioning, gradient reduction, the optimizer, and every
parameter that is no tile's.

Memory, in order of the compute stream: a tile's buffer is allocated on this stream as the tile before it begins, filled
from another one that waits for it, and let go after the tile's work. So a buffer is reused without the host ever
waiting, and no more than two tiles are alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_tiling.partitioned.modules import TILE_MODULES, PartitionedTiles

#: Settings of ``zero_optimization`` that change how parameters are gathered, and the values under which they do not.
OTHER_GATHERING: dict[str, tuple[Any, ...]] = {
    "zero_quantized_weights": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_hpz_partition_size": (1,),
    "mics_shard_size": (-1,),
    "stage3_use_all_reduce_for_fetch_params": (False,),
}


def reason_against(config: Mapping[str, Any]) -> str:
    """Why DeepSpeed's own hooks must gather the tiles under this configuration, or nothing."""
    zero = config["zero_optimization"]
    for name, usual in OTHER_GATHERING.items():
        if zero.get(name, usual[0]) not in usual:
            return f"{name} {zero[name]}"
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "offload_param.device nvme"
    if (config.get("torch_autocast") or {}).get("enabled"):
        return "torch_autocast"
    return ""


@dataclass(eq=False)
class _Tile:
    """The parameters that are gathered together, and what comes after them in each phase of a step."""

    parameters: tuple[Any, ...]
    elements: int
    following: dict[str, _Tile]


@dataclass
class _Gather:
    """A parameter on its way: its whole, of ``ds_shape``, and what must be waited for and kept until then."""

    parameter: Any
    whole: Tensor
    work: Any = None
    copied: torch.cuda.Event | None = None
    shard: Tensor | None = None

    def wait(self) -> Tensor:
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        if self.work is not None:
            self.work.wait()
        self.work = self.copied = self.shard = None
        return self.whole


class TileGathering:
    """Gathers the tiles of one model, each forward and backward; the order of the first pass is the order of all.

    Args:
        model: in a DeepSpeed engine's hands already.
        elements_ahead: the next tile is fetched ahead of its use if it has no more elements.
    """

    def __init__(self, model: Module, elements_ahead: int) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._status = ZeroParamStatus
        self._elements_ahead = elements_ahead
        #: Parameters that are whole because of us, by ``id``.
        self._gathered: dict[int, Any] = {}
        self._ahead: tuple[_Tile, list[_Gather]] | None = None
        self._last: tuple[_Tile, str] | None = None
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        model.register_forward_pre_hook(lambda *_: self.reset())
        for module in model.modules():
            if isinstance(module, PartitionedTiles):
                _remove_hooks_of_deepspeed(module)
            elif isinstance(module, TILE_MODULES):
                _remove_hooks_of_deepspeed(module)
                self._attach(module)

    def reset(self) -> None:
        """Let everything go: weights have changed, or a pass was given up halfway."""
        self._release(*self._gathered.values())
        self._take_ahead(None)
        self._last = None

    def _attach(self, module: Module) -> None:
        parameters: tuple[Any, ...] = tuple(module.parameters())
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        tile = _Tile(parameters, sum(parameter.ds_numel for parameter in parameters), {})

        def before_forward(*_: Any) -> None:
            # A recomputed forward pass runs within the backward pass, in another order than the first.
            self._acquire(tile, "forward" if torch._C._current_graph_task_id() == -1 else "recompute")

        def before_backward(*_: Any) -> None:
            self._acquire(tile, "backward")

        def after_forward(_module: Module, _args: Any, output: Any) -> None:
            node = (output[0] if isinstance(output, tuple) else output).grad_fn
            if node is not None:
                node.register_prehook(before_backward)
                if frozen:
                    node.register_hook(lambda *_: self._release(*frozen))
            self._release(*parameters)

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)
        for parameter in parameters:
            if parameter.requires_grad:  # registered after the engine's hook, which takes the gradient away
                parameter.register_post_accumulate_grad_hook(self._release)

    def _acquire(self, tile: _Tile, phase: str) -> None:
        gathers = self._take_ahead(tile)
        if gathers is None:
            gathers = self._start(tile)
        if self._last is not None and self._last[1] == phase:
            self._last[0].following[phase] = tile
        self._last = tile, phase
        following = tile.following.get(phase)
        if following is not None and following.elements <= self._elements_ahead:
            self._ahead = following, self._start(following)
        for gather in gathers:
            parameter = gather.parameter
            parameter.data = gather.wait()
            parameter.ds_status = self._status.AVAILABLE
            self._gathered[id(parameter)] = parameter

    def _take_ahead(self, tile: _Tile | None) -> list[_Gather] | None:
        """What was fetched ahead, if it was this tile; else it is let go."""
        (expected, gathers), self._ahead = self._ahead or (None, []), None
        if expected is tile:
            return gathers
        for gather in gathers:
            gather.wait()
        return None

    def _start(self, tile: _Tile) -> list[_Gather]:
        missing = [one for one in tile.parameters if one.ds_status is self._status.NOT_AVAILABLE]
        return [self._gather(parameter) for parameter in missing]

    def _gather(self, parameter: Any) -> _Gather:
        shard, group = parameter.ds_tensor.data, parameter.ds_process_group
        copied = None
        if self._copies is not None and not shard.is_cuda:
            on_host, shard = shard, torch.empty_like(shard, device="cuda")
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                shard.copy_(on_host, non_blocking=True)
                copied = self._copies.record_event()
        whole, work = shard, None
        if group.size() > 1:
            whole = shard.new_empty(shard.numel() * group.size())
            with torch.cuda.stream(self._copies if copied is not None else None):
                work = dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)
        return _Gather(parameter, whole[: parameter.ds_numel].view(parameter.ds_shape), work, copied, shard)

    def _release(self, *parameters: Any) -> None:
        for parameter in parameters:
            if self._gathered.pop(id(parameter), None) is not None:
                parameter.data = parameter.data.new_empty(0)
                parameter.ds_status = self._status.NOT_AVAILABLE


def _remove_hooks_of_deepspeed(module: Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]

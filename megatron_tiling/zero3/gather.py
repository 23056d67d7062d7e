"""Tiles under ZeRO-3 are gathered by hooks of our own, one tile ahead of its use.

DeepSpeed's hooks on a module cost about 1 ms of host time a step, wait for streams, and fetch ahead only as far as
thresholds in elements allow: with many small modules the GPU waits for them. A tile's hooks need to know one thing
only: which tile comes next. All else stays the engine's: partitioning, gradient reduction, the optimizer, and every
parameter that is no tile's.

Memory, in order of the compute stream: a tile's buffer is allocated on this stream as the tile before it begins, filled
from another one that waits for it, and let go after the tile's work. So a buffer is reused without the host ever
waiting, and no more than two tiles are alive.

Hazard: weights change between passes (a step of the optimizer, a loaded checkpoint), and nothing tells. So what is
fetched ahead serves the same pass only: one call of the model, or one backward pass. A tile that is called by itself,
outside of them, is gathered for this one call. Within a pass, a tile that anyone else has gathered meanwhile (and may
have written to) is fetched again.
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
from megatron_tiling.tiles.ownership import whole_shape, whole_size

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
    """A parameter on its way: its whole, and what must be waited for and kept until then."""

    parameter: Any
    whole: Tensor
    work: Any = None
    copied: torch.cuda.Event | None = None
    shard: Tensor | None = None

    def __post_init__(self) -> None:
        self._placeholder = self.parameter.data  # empty; who gathers the parameter and lets it go leaves another one

    def is_current(self) -> bool:
        """Whether nobody else has gathered the parameter since."""
        storage = self.parameter.untyped_storage()
        return bool(storage._cdata == self._placeholder.untyped_storage()._cdata)

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
        #: Parameters that are whole because of us, by ``id``, and their wholes.
        self._held: dict[int, tuple[Any, Tensor]] = {}
        #: On their way, by ``id`` of the parameter.
        self._ahead: dict[int, _Gather] = {}
        self._last: tuple[_Tile, str] | None = None
        #: What the current pass is: a graph task of autograd's, or a call of the model; ``None`` outside of both.
        self._pass: int | str | None = None
        self._in_call = False
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        model.register_forward_pre_hook(lambda *_: self._set_in_call(True))
        model.register_forward_hook(lambda *_: self._set_in_call(False), always_call=True)
        for module in model.modules():
            if isinstance(module, PartitionedTiles):
                _remove_hooks_of_deepspeed(module)
            elif isinstance(module, TILE_MODULES):
                _remove_hooks_of_deepspeed(module)
                self._attach(module)

    def _set_in_call(self, in_call: bool) -> None:
        self._end_pass()
        self._in_call = in_call

    def _end_pass(self) -> None:
        """Let everything go: weights may change now, or a pass was given up halfway."""
        self._release(*(parameter for parameter, _ in self._held.values()))
        self._take_ahead()
        self._last = self._pass = None

    def _begin_pass(self) -> None:
        task = torch._C._current_graph_task_id()
        current = task if task != -1 else "call" if self._in_call else None
        if current is None or current != self._pass:
            self._end_pass()
            self._pass = current
            if task != -1:  # gradients of inputs alone release no weight
                torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)

    def _attach(self, module: Module) -> None:
        parameters: tuple[Any, ...] = tuple(module.parameters())
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        tile = _Tile(parameters, sum(map(whole_size, parameters)), {})

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
        self._begin_pass()
        ahead = self._take_ahead(tile.parameters)
        gathers = [ahead.get(id(one)) or self._gather(one) for one in self._missing(tile)]
        if self._last is not None and self._last[1] == phase:
            self._last[0].following[phase] = tile
        self._last = tile, phase
        following = tile.following.get(phase)
        if self._pass is not None and following is not None and following.elements <= self._elements_ahead:
            self._ahead = {id(parameter): self._gather(parameter) for parameter in self._missing(following)}
        for gather in gathers:
            parameter = gather.parameter
            parameter.data = whole = gather.wait()
            parameter.ds_status = self._status.AVAILABLE
            self._held[id(parameter)] = parameter, whole

    def _take_ahead(self, parameters: tuple[Any, ...] = ()) -> dict[int, _Gather]:
        """What was fetched ahead of these parameters; the rest, and what is old by now, is let go."""
        ahead, self._ahead = self._ahead, {}
        wanted = {id(parameter) for parameter in parameters}
        for key, gather in list(ahead.items()):
            if key not in wanted or not gather.is_current():
                ahead.pop(key).wait()
        return ahead

    def _missing(self, tile: _Tile) -> list[Any]:
        return [one for one in tile.parameters if one.ds_status is self._status.NOT_AVAILABLE]

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
        return _Gather(parameter, whole[: whole_size(parameter)].view(whole_shape(parameter)), work, copied, shard)

    def _release(self, *parameters: Any) -> None:
        for parameter in parameters:
            _, whole = self._held.pop(id(parameter), (None, None))
            if whole is not None and parameter.data_ptr() == whole.data_ptr():  # else others have let it go before
                parameter.data = parameter.data.new_empty(0)
                parameter.ds_status = self._status.NOT_AVAILABLE


def _remove_hooks_of_deepspeed(module: Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]

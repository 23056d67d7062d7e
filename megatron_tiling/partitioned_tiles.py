"""Tiles as modules that own their weights, for engines that partition parameters (ZeRO-3, FSDP).

Such an engine gathers a module's parameters around its forward call, and again around the backward pass of what it
returned. So each tile is one module, called once a forward pass, whose work is one autograd function.

Hazard: an engine swaps a parameter's data or frees its storage between the two passes. These functions keep the
parameter and read it again in the backward pass; a saved tensor would keep the gathered weight alive, or be empty.

Depends on torch alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from megatron_tiling.functional import flat
from megatron_tiling.tiling import TiledLinearReturnBias


class WeightTile(torch.nn.Module):
    """One tile of a layer's weight. The bias, if any, is the layer's.

    Args:
        weight: ``[out_o, in_i]``; for a paired tile the gate's rows above the up's.
    """

    def __init__(self, weight: Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """``[..., in_i]`` -> ``[..., out_o]``, and no bias."""
        return tile_product(input_, self.weight), None

    def extra_repr(self) -> str:
        return "in_features={1}, out_features={0}".format(*getattr(self.weight, "ds_shape", self.weight.shape))


class PairedTiles(TiledLinearReturnBias):
    """Out-tiles ``[gate_o | up_o]``, joined as ``[gate | up]``."""

    def _combine_output_splits(self, outputs: Iterable[tuple[Tensor, None]]) -> tuple[Tensor, None]:
        gates, ups = zip(*(output.chunk(2, dim=-1) for output, _ in outputs), strict=True)
        return torch.cat((*gates, *ups), dim=-1), None


def tile_product(input_: Tensor, weight: Parameter) -> Tensor:
    """``input_ @ weight.T``: ``[..., in_i]``, ``[out_o, in_i]`` -> ``[..., out_o]``, in the dtype of input or autocast."""
    output: Tensor = _TileProduct.apply(autocast(input_), weight)
    return output


def autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast asks for, if it is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class _TileProduct(torch.autograd.Function):
    """The product of one tile. Tokens ``n`` = all dimensions but the last.

    =======  ==========================================  ===========================
    forward  x ``[n, in_i]``, W ``[out_o, in_i]``         y ``[n, out_o]`` = x W^T
    dgrad    dy ``[n, out_o]``, W                         dx ``[n, in_i]`` = dy W
    wgrad    dy, x                                        dW ``[out_o, in_i]`` = dy^T x
    =======  ==========================================  ===========================
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Parameter) -> Tensor:
        _, needs_wgrad = ctx.needs_input_grad
        ctx.weight = weight
        ctx.save_for_backward(input_ if needs_wgrad else None)
        output = flat(input_) @ weight.to(input_.dtype).t()
        return output.view(*input_.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (input_,) = ctx.saved_tensors
        weight: Parameter = ctx.weight
        needs_dgrad, needs_wgrad = ctx.needs_input_grad
        dy = flat(grad_output)
        dgrad = wgrad = None
        if needs_dgrad:
            dgrad = dy @ weight.to(dy.dtype)
            dgrad = dgrad.view(*grad_output.shape[:-1], dgrad.shape[-1])
        if needs_wgrad:
            wgrad = (dy.t() @ flat(input_)).to(weight.dtype)
        return dgrad, wgrad


@contextmanager
def regathered_in_backward(gathered: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Iterator[None]:
    """What runs inside keeps the rank's shard in place of the gathered input, as Megatron's layers do.

    The backward passes of all tiles together gather it once more.

    Args:
        gathered: ``[s, ...]``; recognised by its storage, also in views of it.
        shard: ``[s/tp, ...]``, what it was gathered from.
        group: the tensor-parallel group.
    """
    if gathered.numel() == 0:
        yield
        return
    storage = gathered.untyped_storage().data_ptr()
    again = _Regathered(shard.detach(), group)

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        again.uses += 1
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else again.take().as_strided(*saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Regathered:
    """An input that is gathered for the first tile that needs it in the backward pass, and dropped after the last."""

    def __init__(self, shard: Tensor, group: dist.ProcessGroup) -> None:
        self.shard, self.group = shard.contiguous(), group
        self.uses = self.left = 0
        self.full: Tensor | None = None

    def take(self) -> Tensor:
        if self.full is None:
            self.full = self.shard.new_empty(self.shard.shape[0] * self.group.size(), *self.shard.shape[1:])
            dist.all_gather_into_tensor(self.full, self.shard, group=self.group)
            self.left = self.uses
        full = self.full
        self.left -= 1
        if self.left == 0:
            self.full = None
        return full

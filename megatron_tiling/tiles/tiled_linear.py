"""TiledLinear and TiledLinearReturnBias: a linear layer whose weight is a grid of tile modules.

The interface is that of DeepSpeed's classes of the same names (``deepspeed/runtime/zero/tiling.py``), whose state
dict keys ``linears.<o>.<i>.weight`` are kept. Each tile is a module of its own that is called once a forward, so
engines that partition or offload parameters (ZeRO-3, FSDP) hold one tile at a time. Nothing but ``copy_params_from``
looks at a tile's parameters, which may be packed, lazy, adapted or away.

Different from the original: in plain eager mode an out-tile is written into its columns of the output as soon as it is
ready, with no concatenation of all of them; a one-element list is accepted for ``in_splits=1``; parameters are copied
by the sizes that tiles really have, which may be shards (tensor parallelism).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from megatron_tiling.tiles.grid import TileGrid, partition_uniform
from megatron_tiling.tiles.ownership import copy_param, whole_shape


def split_tensor_along_last_dim(
    tensor: Tensor, partitions: Sequence[int], contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Split ``[..., sum(partitions)]`` into views ``[..., partitions[p]]``, or into copies if asked for contiguous."""
    chunks = torch.split(tensor, list(partitions), dim=-1)
    return tuple(chunk.contiguous() for chunk in chunks) if contiguous_split_chunks else chunks


class TiledLinear(torch.nn.Module):
    """``torch.nn.Linear`` as a grid of ``in_splits`` x ``out_splits`` tiles, computed one after another.

    Args:
        in_features, out_features, bias: as for ``torch.nn.Linear``. Each out-tile's bias is held by its last in-tile.
        in_splits, out_splits: tiles along the input and the output features.
        input_is_already_split: ``forward`` takes ``in_splits`` tensors: a sequence, or one stacked tensor.
        combine_out_splits: join the out-tiles' outputs; if ``False``, ``forward`` returns a list of them.
        linear_cls: called as ``linear_cls(in, out, bias=..., **kwargs)`` once a tile, in (o, i) order.
        init_linear: a linear layer to copy the parameters of.
        kwargs: more keywords for ``linear_cls``.

    Raises:
        RuntimeError: ``in_splits`` or ``out_splits`` is not within ``[1, features]``.

    >>> layer = TiledLinear(6, 8, in_splits=2, out_splits=4)
    >>> layer(torch.zeros(5, 6)).shape
    torch.Size([5, 8])
    >>> layer.linears[3][1].weight.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., torch.nn.Module] = torch.nn.Linear,
        init_linear: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        try:
            grid = TileGrid(in_features, out_features, in_splits, out_splits)
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = bias
        self.in_splits = in_splits
        self.out_splits = out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = grid.in_parts
        self.out_parts = grid.out_parts
        self.linears = torch.nn.ModuleList(
            torch.nn.ModuleList(
                linear_cls(grid.in_size(i), grid.out_size(o), bias=bias if i == in_splits - 1 else False, **kwargs)
                for i in range(in_splits)
            )
            for o in range(out_splits)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Any) -> Any:
        """``[..., in_features]`` or its ``in_splits`` parts -> ``[..., out_features]``, or a list of out-tiles.

        Raises:
            ValueError: the input is split into another number of parts than ``in_splits``.
        """
        inputs = self._inputs(input_)
        outputs = (self._out_tile(inputs, out_id) for out_id in range(self.out_splits))
        if not self.combine_out_splits:
            return list(outputs)
        if not (_is_plain_eager() and self._hooks_are_own()):
            return self._combine_output_splits(list(outputs))
        if self.in_splits == 1 < self.out_splits:  # joining copies the tiles' outputs: they need no copies before
            outputs = (self._tile(out_id, 0)(inputs[0]) for out_id in range(self.out_splits))
        return self._combine_output_splits(outputs)

    def _inputs(self, input_: Any) -> Any:
        """What the in-tiles take: anything that has a length and an element for each."""
        if self.in_splits == 1 and not (self.input_is_already_split and isinstance(input_, (list, tuple))):
            return [input_]
        if not self.input_is_already_split:
            width = input_.shape[-1]  # of the rank's shard, if the tiles are shards
            parts = self.in_parts if width == self.in_features else partition_uniform(width, self.in_splits)
            return self._split_global_input(input_, _sizes(parts))
        if len(input_) != self.in_splits:
            raise ValueError(f"the input is split into {len(input_)} parts, but in_splits={self.in_splits}")
        return input_

    def _out_tile(self, inputs: Any, out_id: int) -> Any:
        output = None
        for in_id in range(self.in_splits):
            new_out = self._tile(out_id, in_id)(inputs[in_id])
            output = self._reduce_local_output(in_id=in_id, out_id=out_id, current_out=output, new_out=new_out)
        return output

    def _tile(self, out_id: int, in_id: int) -> Any:
        row: Any = self.linears[out_id]
        return row[in_id]

    def _hooks_are_own(self) -> bool:
        """Whether nobody has overridden, on a class or an instance, what is done with the tiles' outputs."""
        hooks = (self._reduce_local_output, self._combine_output_splits)
        return all(getattr(hook, "__func__", None) in _OWN_HOOKS for hook in hooks)

    def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Any]:
        """Split the input ``[..., sum(split_sizes)]`` into one part a tile. Override for other input types."""
        return split_tensor_along_last_dim(input, split_sizes)

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        """Add a tile's output to the sum of those before it (``None`` at the first). Override for other types."""
        # A copy: whoever holds the tile's output may change it, and whoever gets ours too.
        return new_out.clone() if current_out is None else current_out + new_out

    def _combine_output_splits(self, outputs: Iterable[Any]) -> Any:
        """Join a list of out-tiles along the last dimension. An override is given a list, ours an iterator too."""
        if isinstance(outputs, Iterator):
            return _join(outputs, _sizes(self.out_parts))
        tensors = list(outputs)
        assert len(tensors) == self.out_splits
        return torch.cat(tensors, dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: torch.nn.Module) -> None:
        """Copy weight and bias of a dense layer, or of a rank's shard of one if the tiles are shards.

        With parameters partitioned by ZeRO-3 this is a collective: data-parallel rank 0's values count.

        Raises:
            ValueError: the shapes differ, or only one of the two layers has a bias.
        """
        rows = [whole_shape(self._tile(out_id, 0).weight)[0] for out_id in range(self.out_splits)]
        columns = [whole_shape(self._tile(0, in_id).weight)[1] for in_id in range(self.in_splits)]
        weight, bias = other.weight, other.bias
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != (sum(rows), sum(columns)):
            raise ValueError(f"cannot copy a weight {tuple(weight.shape)} into tiles of [{sum(rows)}, {sum(columns)}]")
        if (bias is not None) != bool(self.use_bias):
            raise ValueError(
                f"bias={self.use_bias} here, but the layer to copy has {'no' if bias is None else 'a'} bias"
            )
        for out_id, block in enumerate(weight.split(rows)):
            for in_id, part in enumerate(block.split(columns, dim=1)):
                copy_param(self._tile(out_id, in_id).weight, part)
        if isinstance(bias, Tensor):
            for out_id, part in enumerate(bias.split(rows)):
                copy_param(self._tile(out_id, self.in_splits - 1).bias, part)


class TiledLinearReturnBias(TiledLinear):
    """``TiledLinear`` over tiles that return ``(output, bias)``, as Megatron's linear layers do.

    ``forward`` returns ``(output, bias)`` of the whole layer, or with ``combine_out_splits=False`` a list with the
    pair of each out-tile. The bias is returned, never added; it is ``None`` where no tile has one.
    """

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        """Sum the outputs, and keep the one bias that comes with them."""
        tensor, bias = new_out
        current, current_bias = (None, None) if current_out is None else current_out
        tensor = super()._reduce_local_output(in_id=in_id, out_id=out_id, current_out=current, new_out=tensor)
        return tensor, current_bias if bias is None else bias

    def _combine_output_splits(self, outputs: Iterable[Any]) -> Any:
        """Join the outputs, and the biases, of all out-tiles or of none."""
        biases = []

        def tensors() -> Iterator[Tensor]:
            for tensor, bias in outputs:
                if bias is not None:
                    biases.append(bias)
                yield tensor

        tensor = super()._combine_output_splits(tensors() if isinstance(outputs, Iterator) else list(tensors()))
        return tensor, super()._combine_output_splits(biases) if biases else None


#: What was shipped, not what somebody may have put in its place.
_OWN_HOOKS = {
    TiledLinear._reduce_local_output,
    TiledLinear._combine_output_splits,
    TiledLinearReturnBias._reduce_local_output,
    TiledLinearReturnBias._combine_output_splits,
}


def _is_plain_eager() -> bool:
    """Whether autograd alone looks at operations: nothing compiles, traces, transforms or intercepts them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


class _WriteColumns(torch.autograd.Function):
    """Copy a tile's output into its columns of the layer's output, in place.

    ========  ==========================================  ======================================================
    forward   output ``[..., n]``, tile ``[..., k]``      output, its columns from ``start`` on overwritten
    backward  grad of the output ``[..., n]``             output: the same grad (what it held before is not used);
                                                          tile: a view ``[..., k]`` of it
    ========  ==========================================  ======================================================
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, tile: Tensor, start: int) -> Tensor:
        ctx.columns = (start, tile.shape[-1])
        ctx.mark_dirty(output)
        output.narrow(-1, *ctx.columns).copy_(tile)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.narrow(-1, *ctx.columns), None


def _join(tiles: Iterator[Tensor], widths: Sequence[int]) -> Tensor:
    """``torch.cat`` of copies of the tiles, each being written and dropped before the next one is made.

    A single tile must be a copy already. From the first tile on that is no plain tensor of the planned width, or unlike
    those before it, ``torch.cat`` decides what becomes of them.
    """
    if len(widths) == 1:
        return next(tiles)
    joined: Tensor | None = None
    start = 0
    for width in widths:
        tile = next(tiles)
        plain = (
            type(tile) is Tensor  # no subclass, which may be sharded or fake, and no proxy
            and tile.layout is torch.strided
            and tile.is_floating_point()  # not quantized
            and tile.shape[-1:] == (width,)
            and unpack_dual(tile).tangent is None
        )
        if joined is None and plain:
            joined = tile.new_empty(*tile.shape[:-1], sum(widths))
        if joined is None or not plain or _kind(tile) != _kind(joined):
            written = () if joined is None else (joined[..., :start],)
            return torch.cat((*written, *(rest.clone() for rest in chain((tile,), tiles))), dim=-1)
        joined = _WriteColumns.apply(joined, tile, start)
        start += width
        del tile
    assert joined is not None
    return joined


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape[:-1]


def _sizes(parts: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(parts)]

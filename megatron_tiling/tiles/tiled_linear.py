"""TiledLinear and TiledLinearReturnBias: a linear layer whose weight is a grid of tile modules.

The interface is that of DeepSpeed's classes of the same names (``deepspeed/runtime/zero/tiling.py``), whose state
dict keys ``linears.<o>.<i>.weight`` are kept. Each tile is a module of its own that is called once a forward, so
engines that partition or offload parameters (ZeRO-3, FSDP) hold one tile at a time.

Different from the original: an out-tile is written into its columns of the output as soon as it is ready, with
neither a clone per tile nor a concatenation of all of them; a one-element list is accepted for ``in_splits=1``;
tile modules that shard themselves (tensor parallelism) are split and initialised by the sizes they really have.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_tiling.tiles.grid import TileGrid
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
        input_is_already_split: ``forward`` takes a sequence of ``in_splits`` tensors.
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
                linear_cls(grid.in_size(i), grid.out_size(o), bias=bias and i == in_splits - 1, **kwargs)
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
        inputs = self._input_tiles(input_)
        outputs = (self._out_tile(inputs, out_id) for out_id in range(self.out_splits))
        if not self.combine_out_splits:
            return list(outputs)
        # Our own hook takes the tiles as they are made; one that a subclass brings is handed the whole list.
        lazy = type(self)._combine_output_splits.__module__ == __name__
        return self._combine_output_splits(outputs if lazy else list(outputs))

    def _input_tiles(self, input_: Any) -> Sequence[Any]:
        if self.input_is_already_split and isinstance(input_, (list, tuple)):
            if len(input_) != self.in_splits:
                raise ValueError(f"the input is split into {len(input_)} parts, but in_splits={self.in_splits}")
            return input_
        if self.in_splits == 1:
            return [input_]
        if self.input_is_already_split:
            raise ValueError(
                f"input_is_already_split=True takes a list or tuple of in_splits={self.in_splits} tensors, "
                f"not a {type(input_).__name__}"
            )
        return self._split_global_input(input_, self._in_sizes())

    def _out_tile(self, inputs: Sequence[Any], out_id: int) -> Any:
        output = None
        for in_id, tile in enumerate(self._row(out_id)):
            output = self._reduce_local_output(
                in_id=in_id, out_id=out_id, current_out=output, new_out=tile(inputs[in_id])
            )
        return output

    def _row(self, out_id: int) -> Iterator[torch.nn.Module]:
        row = self.linears[out_id]
        assert isinstance(row, torch.nn.ModuleList)
        return iter(row)

    def _in_sizes(self) -> list[int]:
        """Input features that each in-tile takes, by its own weight: fewer than ``in_parts`` if the tile is a shard."""
        return [_weight_shape(tile)[1] for tile in self._row(0)]

    def _out_sizes(self) -> list[int]:
        return [_weight_shape(next(self._row(out_id)))[0] for out_id in range(self.out_splits)]

    def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Any]:
        """Split the input ``[..., sum(split_sizes)]`` into one part a tile. Override for other input types."""
        return split_tensor_along_last_dim(input, split_sizes)

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        """Add a tile's output to the sum of those before it (``None`` at the first). Override for other types."""
        if current_out is None:
            return new_out
        # The first sum is a new tensor, and nothing but this loop holds it: the others can be added in place.
        return current_out + new_out if in_id == 1 else current_out.add_(new_out)

    def _combine_output_splits(self, outputs: Iterable[Any]) -> Any:
        """Join the out-tiles along the last dimension. An override is given a list, ours takes any iterable."""
        return _join(outputs, self._out_sizes())

    @torch.no_grad()
    def copy_params_from(self, other: torch.nn.Module) -> None:
        """Copy weight and bias of a dense layer, or of a rank's shard of one if the tiles are shards.

        With parameters partitioned by ZeRO-3 this is a collective: data-parallel rank 0's values count.

        Raises:
            ValueError: the shapes differ, or only one of the two layers has a bias.
        """
        out_sizes, in_sizes = self._out_sizes(), self._in_sizes()
        weight, bias = other.weight, other.bias
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != (sum(out_sizes), sum(in_sizes)):
            raise ValueError(
                f"cannot copy a weight {tuple(weight.shape)} into tiles of [{sum(out_sizes)}, {sum(in_sizes)}]"
            )
        if (bias is not None) != self.use_bias:
            raise ValueError(
                f"bias={self.use_bias} here, but the layer to copy has {'no' if bias is None else 'a'} bias"
            )
        for out_id, rows in enumerate(_slices(out_sizes)):
            for tile, columns in zip(self._row(out_id), _slices(in_sizes), strict=True):
                copy_param(tile.weight, weight[rows, columns])
                if tile.bias is not None:
                    assert isinstance(bias, Tensor)
                    copy_param(tile.bias, bias[rows])


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
        biases = []

        def tensors() -> Iterator[Tensor]:
            for tensor, bias in outputs:
                if bias is not None:
                    biases.append(bias)
                yield tensor

        tensor = super()._combine_output_splits(tensors())
        return tensor, torch.cat(biases, dim=-1) if biases else None


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


def _join(tiles: Iterable[Tensor], sizes: Sequence[int]) -> Tensor:
    """``torch.cat(tiles, dim=-1)``, each tile being written and dropped before the next one is made."""
    iterator = iter(tiles)
    tile: Tensor | None = next(iterator)
    assert tile is not None
    if len(sizes) == 1:
        return tile
    if tile.shape[-1] != sizes[0]:  # a tile module that gathers its output: its width is its own business
        return torch.cat((tile, *iterator), dim=-1)
    output = tile.new_empty(*tile.shape[:-1], sum(sizes))
    start = 0
    while tile is not None:
        output = _WriteColumns.apply(output, tile, start)
        start += tile.shape[-1]
        tile = next(iterator, None)
    return output


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _weight_shape(tile: torch.nn.Module) -> Sequence[int]:
    """Shape of a tile's weight, also while ZeRO-3 has partitioned it away (``ds_shape``).

    ``tile.weight``, read while another module runs, would have ZeRO-3 gather the tile then and ever after.
    """
    weight: Any = dict.get(tile._parameters, "weight")
    if weight is None:
        weight = tile.weight
    return whole_shape(weight)

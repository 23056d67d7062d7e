"""TiledLinear for DeepSpeed's class: over tiles of any kind, of any arguments, with overridden hooks."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import megatron_tiling.tiling as ours
from tests.tiles.drop_in import (
    Activated,
    Case,
    Grid,
    Returns,
    assert_same,
    check,
    input_of,
    made,
    make,
    theirs,
    trained,
)

# Tiles that are not torch.nn.Linear.


class Adapted(nn.Module):
    """No ``weight``: LoRA around a base layer; GPTQ, AWQ and HQQ layers are alike."""

    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(i, o, bias=bias), nn.Linear(i, 2, False), nn.Linear(2, o, False)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.up(self.down(x))


class Packed(nn.Module):
    """Two 4-bit numbers a byte, weight ``[n / 2, 1]``, as in bitsandbytes."""

    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__()
        self.shape = (o, i)
        self.weight = nn.Parameter(torch.full((i * o // 2, 1), 137, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return x @ torch.stack([self.weight & 15, self.weight >> 4], -1).reshape(self.shape).float().t()


class Transposed(nn.Module):
    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o))

    def forward(self, x: Tensor) -> Any:
        return x @ self.weight


class Lazy(nn.LazyLinear):
    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__(o, bias=bias)


class OneBuffer(nn.Linear):
    """All tiles of a size return the same memory, as a captured graph does."""

    memory: ClassVar[dict[Any, Tensor]] = {}

    def forward(self, x: Tensor) -> Any:
        output = super().forward(x).detach()
        return self.memory.setdefault(output.shape, output.clone()).copy_(output)


class Doubling(nn.Linear):
    """Wider than it was asked to be, as a tile that gathers its output."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).repeat(1, 2)


class Marked(Tensor):
    """A tensor of somebody's own class, which cannot be changed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not Tensor.copy_
        return super().__torch_function__(func, types, args, kwargs)


class OneWideBuffer(OneBuffer, Doubling):
    """Both."""


class ReturnsMarked(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).as_subclass(Marked)


class LinearWithBias(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(x, self.weight), self.bias


def of_tiles(tile_class: Any, **options: Any) -> Case:
    return lambda lib, grid: trained(make(lib, grid, linear_cls=tile_class, **options))


def unlike_tiles(differ: Callable[[int, Tensor], Tensor]) -> Case:
    """Tiles of which each changes its output in its own way."""

    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid)
        for number, tile in enumerate(tile for row in layer.linears for tile in row):
            tile.register_forward_hook(lambda module, args, output, number=number: differ(number, output))
        return trained(layer)

    return case


def changed_outputs(change: Callable[[Tensor], Tensor]) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, (1, grid[1]))
        for row in layer.linears:
            row[0].register_forward_hook(lambda module, args, output: change(output.detach()))
        return layer(input_of())

    return case


def parametrized(method: Callable[[nn.Module], Any]) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid)
        for row in layer.linears:
            for tile in row:
                method(tile)
        return [trained(layer) for _ in range(3)]

    return case


def quantised_later(lib: Any, grid: Grid) -> Any:
    pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this processor has no quantized engine")
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(make(lib, grid)), {nn.Linear})(input_of())


def frozen_but_one(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid).requires_grad_(False)
    layer.linears[-1][0].weight.requires_grad_()
    return trained(layer, input_of())


TILES: dict[str, Case] = {
    "plain": of_tiles(nn.Linear),
    "without weight": of_tiles(Adapted),
    "packed weight": lambda lib, grid: make(lib, grid, linear_cls=Packed, bias=False)(input_of()),
    "weight of [in, out]": of_tiles(Transposed),
    "lazy": of_tiles(Lazy),
    "one output buffer": lambda lib, grid: make(lib, grid, linear_cls=OneBuffer)(input_of()),
    "one wide output buffer": lambda lib, grid: make(lib, grid, linear_cls=OneWideBuffer)(input_of()),
    "output kept by autograd": of_tiles(Activated),
    "wider than asked": of_tiles(Doubling),
    "a view of the input": of_tiles(functools.partial(Returns, what="view")),
    "a parameter": of_tiles(functools.partial(Returns, what="parameter")),
    "tensor subclass": of_tiles(ReturnsMarked),
    "complex": lambda lib, grid: make(lib, grid, dtype=torch.complex64)(input_of(dtype=torch.complex64)),
    "spectral_norm": parametrized(nn.utils.parametrizations.spectral_norm),
    "weight_norm": parametrized(nn.utils.parametrizations.weight_norm),
    "quantised later": quantised_later,
    "dtypes: narrow, then wide": unlike_tiles(lambda number, y: y if number else y.bfloat16()),
    "dtypes: wide, then narrow": unlike_tiles(lambda number, y: y.bfloat16() if number else y),
    "devices differ": unlike_tiles(lambda number, y: y if number else y.to("meta")),
    "leading shapes differ": unlike_tiles(lambda number, y: y[:1] if number else y),
    "widths differ": unlike_tiles(lambda number, y: y[:, :-1] if number == 1 else y),
    "one without gradient": unlike_tiles(lambda number, y: y if number else y.detach()),
    "quantised outputs": changed_outputs(lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8)),
    "sparse outputs": changed_outputs(lambda y: y.relu().to_sparse()),
    "frozen but one": frozen_but_one,
}


# What is handed in, and what a subclass overrides.


def parts_of(grid: Grid) -> list[Tensor]:
    return list(torch.tensor_split(input_of(), grid[0], dim=-1))


def split_input(container: Callable[[list[Tensor]], Any], **options: Any) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid, input_is_already_split=True, **options)
        return layer(container(parts_of(grid)) if grid[0] > 1 else input_of())

    return case


def overriding(name: str, function: Callable[..., Any], how: str, **options: Any) -> Case:
    """A hook of a subclass, an instance or the class itself replaced; ``function`` is given the one before it."""

    def case(lib: Any, grid: Grid) -> Any:
        cls = lib.TiledLinear
        before = getattr(cls, name)

        @functools.wraps(before)
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(before, self, *args, **kwargs)

        if how == "subclass":
            return trained(made(type("Sub", (cls,), {name: hook}), grid, **options))
        layer = made(cls, grid, **options)
        if how == "instance":
            setattr(layer, name, functools.partial(hook, layer))
            return trained(layer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, name, hook)
            return trained(layer)

    return case


def maximum(before: Any, self: Any, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
    assert (current_out is None) == (in_id == 0) and 0 <= out_id < self.out_splits
    return new_out if current_out is None else torch.maximum(current_out, new_out)


def keeps_sums(before: Any, self: Any, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
    """Changes the first sum in place, and never the tile's output."""
    result = before(self, in_id=in_id, out_id=out_id, current_out=current_out, new_out=new_out)
    return result.mul_(2) if current_out is None else result


WAYS = ("subclass", "instance", "class")
HOOKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "split": ("_split_global_input", lambda before, self, given, sizes: before(self, given + len(sizes), sizes)),
    "reduce": ("_reduce_local_output", maximum),
    "reduce, in place": ("_reduce_local_output", keeps_sums),
    "combine": ("_combine_output_splits", lambda before, self, outputs: torch.stack(outputs)),
    "combine, of a list": ("_combine_output_splits", lambda before, self, outputs: before(self, outputs[::-1])),
    "combine, of too few": ("_combine_output_splits", lambda before, self, outputs: before(self, outputs[1:])),
}


def return_bias(**options: Any) -> Case:
    return lambda lib, grid: trained(
        make(lib, grid, "TiledLinearReturnBias", **({"linear_cls": LinearWithBias} | options))
    )


def bias_of_one_tile(lib: Any, grid: Grid) -> Any:
    layer = make(lib, grid, "TiledLinearReturnBias", linear_cls=LinearWithBias)
    layer.linears[-1][-1].bias = None
    return layer(input_of())


def copied_parameters(bias: bool, **options: Any) -> Case:
    def case(lib: Any, grid: Grid) -> Any:
        layer = make(lib, grid, bias=True, **options)
        torch.manual_seed(1)
        layer.copy_params_from(nn.Linear(16, 12, bias=bias))
        return dict(layer.state_dict())

    return case


class AlwaysBias(nn.Linear):
    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__(i, o)


ARGUMENTS: dict[str, Case] = {
    "tensors": lambda lib, grid: [trained(make(lib, grid), input_of(*shape)) for shape in [(16,), (0, 16), (2, 3, 16)]],
    "a narrower shard": lambda lib, grid: make(lib, grid, linear_cls=Lazy)(input_of(4, 11)),
    "fewer features than splits": lambda lib, grid: make(lib, grid)(input_of(4, 1)),
    "list": split_input(list),
    "tuple": split_input(tuple),
    "stacked": split_input(torch.stack),
    "ParameterList": split_input(nn.ParameterList),
    "unsplit": split_input(lambda parts: torch.cat(parts, dim=-1)),
    "one part short": split_input(lambda parts: parts[1:]),
    "listed outputs": of_tiles(nn.Linear, combine_out_splits=False),
    "no bias": of_tiles(nn.Linear, bias=False),
    "returned bias": return_bias(),
    "returned bias, listed": return_bias(combine_out_splits=False),
    "returned bias, none": return_bias(bias=False),
    "returned bias of one tile": bias_of_one_tile,
    "parameters": copied_parameters(bias=True),
    "parameters, bias lacking": copied_parameters(bias=False),
    "parameters, biases that nobody asked for": copied_parameters(bias=True, linear_cls=AlwaysBias),
    "parameters, transposed": copied_parameters(bias=True, linear_cls=Transposed),
    **{f"{name}, {how}": overriding(*hook, how) for name, hook in HOOKS.items() for how in WAYS},
}

#: What DeepSpeed's class refuses on one of the grids at least.
REFUSED = {
    "devices differ",
    "leading shapes differ",
    "widths differ",
    "fewer features than splits",
    "unsplit",
    "one part short",
    "returned bias of one tile",
    "parameters, bias lacking",
    "parameters, transposed",
    *(f"combine, of too few, {how}" for how in WAYS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TILES | ARGUMENTS)
def test_as_deepspeeds(name: str) -> None:
    check((TILES | ARGUMENTS)[name], refused=name in REFUSED)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    sizes = [draw(st.integers(1, 17)), draw(st.integers(1, 19))]
    in_splits, out_splits = (draw(st.integers(1, min(size, 6))) for size in sizes)
    return sizes, {
        "in_splits": in_splits,
        "out_splits": out_splits,
        "bias": draw(st.booleans()),
        "combine_out_splits": draw(st.booleans()),
        "linear_cls": draw(st.sampled_from([nn.Linear, Adapted, Activated, Lazy])),
    }


@given(layers(), st.sampled_from([(), (1,), (5,), (0,), (3, 2)]), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_any_grid(layer: tuple[list[int], dict[str, Any]], leading: tuple[int, ...], seed: int) -> None:
    results = []
    for lib in (ours, theirs):
        torch.manual_seed(seed)
        tiled = lib.TiledLinear(*layer[0], **layer[1])
        results.append([tiled.in_parts, tiled.out_parts, trained(tiled, torch.randn(*leading, layer[0][0]))])
    assert_same(*results)

"""TiledLinear and TiledLinearReturnBias against torch.nn.Linear, and the API that DeepSpeed's users know."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling import TiledLinear, TiledLinearReturnBias, TileGrid, split_tensor_along_last_dim
from megatron_tiling.tiles.linear import TileLoop, tiled_linear


class LinearWithBias(torch.nn.Linear):
    """Returns its bias instead of adding it, as Megatron's layers do with skip_bias_add."""

    def forward(self, input: Tensor) -> Any:
        return torch.nn.functional.linear(input, self.weight), self.bias


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    in_features, out_features = draw(st.integers(1, 17)), draw(st.integers(1, 19))
    return {
        "in_features": in_features,
        "out_features": out_features,
        "in_splits": draw(st.integers(1, min(in_features, 6))),
        "out_splits": draw(st.integers(1, min(out_features, 6))),
        "bias": draw(st.booleans()),
        "leading": draw(st.sampled_from([(), (1,), (5,), (0,), (3, 2), (0, 2)])),
        "as_list": draw(st.booleans()),
        "combine": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


def grads_of_tiles(layer: TiledLinear) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([torch.cat([tile.weight.grad for tile in row], dim=1) for row in layer.linears])
    biases = [row[-1].bias.grad for row in layer.linears if row[-1].bias is not None]
    return weight, torch.cat(biases) if biases else None


def dense_and_input(case: dict[str, Any]) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    torch.manual_seed(case["seed"])
    dense = torch.nn.Linear(case["in_features"], case["out_features"], bias=case["bias"], dtype=torch.float64)
    x = torch.randn(*case["leading"], case["in_features"], dtype=torch.float64, requires_grad=True)
    return dense, x, torch.randn(*case["leading"], case["out_features"], dtype=torch.float64)


def parts_of(x: Tensor, case: dict[str, Any]) -> tuple[Any, Tensor]:
    """The input to give, and the leaf whose gradient to read."""
    leaf = x.detach().clone().requires_grad_()
    grid = TileGrid(case["in_features"], case["out_features"], case["in_splits"], case["out_splits"])
    given = [leaf[..., grid.columns(i)] for i in range(grid.in_splits)] if case["as_list"] else leaf
    return given, leaf


def tiled_like(
    dense: torch.nn.Linear, case: dict[str, Any], tiled_class: type[TiledLinear] = TiledLinear, **options: Any
) -> TiledLinear:
    return tiled_class(
        case["in_features"],
        case["out_features"],
        bias=case["bias"],
        in_splits=case["in_splits"],
        out_splits=case["out_splits"],
        input_is_already_split=case["as_list"],
        combine_out_splits=case["combine"],
        init_linear=dense,
        dtype=torch.float64,
        **options,
    )


def assert_close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@given(layers())
@settings(max_examples=150, deadline=None)
def test_tiled_linear_is_linear(case: dict[str, Any]) -> None:
    dense, x, upstream = dense_and_input(case)
    tiled = tiled_like(dense, case)
    given, leaf = parts_of(x, case)
    output = tiled(given)
    if not case["combine"]:
        assert len(output) == case["out_splits"]
        output = torch.cat(output, dim=-1)
    expected = dense(x)
    assert_close(output, expected)
    expected.backward(upstream)
    output.backward(upstream)
    assert_close(leaf.grad, x.grad)
    weight_grad, bias_grad = grads_of_tiles(tiled)
    assert_close(weight_grad, dense.weight.grad)
    assert_close(bias_grad, dense.bias.grad if case["bias"] else None)


@given(layers())
@settings(max_examples=100, deadline=None)
def test_return_bias_is_linear(case: dict[str, Any]) -> None:
    dense, x, upstream = dense_and_input(case)
    tiled = tiled_like(dense, case, TiledLinearReturnBias, linear_cls=LinearWithBias)
    given, leaf = parts_of(x, case)
    result = tiled(given)
    if not case["combine"]:
        assert len(result) == case["out_splits"] and all(len(pair) == 2 for pair in result)
        output = torch.cat([tensor for tensor, _ in result], dim=-1)
        bias = torch.cat([part for _, part in result]) if case["bias"] else None
    else:
        output, bias = result
    assert (bias is not None) == case["bias"]
    output = output if bias is None else output + bias
    expected = dense(x)
    assert_close(output, expected)
    expected.backward(upstream)
    output.backward(upstream)
    assert_close(leaf.grad, x.grad)
    assert_close(grads_of_tiles(tiled)[0], dense.weight.grad)
    assert_close(grads_of_tiles(tiled)[1], dense.bias.grad if case["bias"] else None)


@given(layers(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_resident_tile_loop_is_linear(case: dict[str, Any], paired: bool) -> None:
    if paired:  # gate and up halves: tiles of both, so they are not joined
        case = case | {"out_features": 2 * case["out_features"], "combine": False}
    dense, x, upstream = dense_and_input(case)
    grid = TileGrid(case["in_features"], case["out_features"], case["in_splits"], case["out_splits"], paired)
    weight = dense.weight.detach().clone().requires_grad_()
    bias = dense.bias.detach().clone().requires_grad_() if case["bias"] else None
    given, leaf = parts_of(x, case)
    output = tiled_linear(given, weight, bias, TileLoop(grid, combine_out_splits=case["combine"]))
    if isinstance(output, list):
        assert [part.shape[-1] for part in output] == [grid.out_size(o) for o in range(grid.out_splits)]
        output = unsplit(grid, output)
    expected = dense(x)
    assert_close(output, expected)
    expected.backward(upstream)
    output.backward(upstream)
    assert_close(leaf.grad, x.grad)
    assert_close(weight.grad, dense.weight.grad)
    assert_close(bias.grad if bias is not None else None, dense.bias.grad if case["bias"] else None)


def unsplit(grid: TileGrid, outputs: list[Tensor]) -> Tensor:
    """Columns of the out-tiles, back in the order of the dense output."""
    halves: list[list[Tensor]] = [[], []]
    for o, output in enumerate(outputs):
        sizes = [rows.stop - rows.start for rows in grid.row_ranges(o)]
        for half, part in enumerate(torch.split(output, sizes, dim=-1)):
            halves[half].append(part)
    return torch.cat(halves[0] + halves[1], dim=-1)


@pytest.mark.parametrize("in_splits", [1, 3])
@pytest.mark.parametrize("out_splits", [1, 2])
def test_tile_loop_gradcheck(in_splits: int, out_splits: int) -> None:
    loop = TileLoop(TileGrid(5, 4, in_splits, out_splits))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: tiled_linear(*args, loop), (x, weight, bias))


def test_layers_of_several_shapes_can_be_compiled() -> None:
    def run(x: Tensor, weight: Tensor, grid: TileGrid) -> Tensor | list[Tensor]:
        return tiled_linear(x, weight, None, TileLoop(grid))

    torch.compiler.reset()
    compiled = torch.compile(run, backend="eager")
    for grid in (TileGrid(5, 4, 3, 2), TileGrid(4, 6, 1, 3)):
        x = torch.randn(3, grid.in_features, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(grid.out_features, grid.in_features, dtype=torch.float64, requires_grad=True)
        output = compiled(x, weight, grid)
        torch.testing.assert_close(output, x @ weight.t())
        given = torch.autograd.grad(output, (x, weight), torch.ones_like(output))
        wanted = torch.autograd.grad(x @ weight.t(), (x, weight), torch.ones_like(output))
        torch.testing.assert_close(given, wanted)


def test_frozen_weight_keeps_no_input_and_no_gradient_is_no_dgrad() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4)
    output = tiled_linear(x, weight, None, TileLoop(TileGrid(4, 8, 2, 2)))
    assert isinstance(output, Tensor) and output.grad_fn is not None
    kept = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
    assert [tensor.shape for tensor in kept] == [weight.shape]
    output = tiled_linear(x.detach(), weight.requires_grad_(), None, TileLoop(TileGrid(4, 8, 2, 2)))
    assert isinstance(output, Tensor) and output.grad_fn is not None
    kept = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
    assert [tensor.shape for tensor in kept] == [x.shape]


def test_fused_weight_gradient_accumulates_in_main_grad() -> None:
    x, upstream = torch.randn(6, 4, dtype=torch.bfloat16), torch.randn(6, 8, dtype=torch.bfloat16)
    weight = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.zeros(8, 4)  # type: ignore[attr-defined]
    loop = TileLoop(TileGrid(4, 8, 2, 2), fuse_wgrad=True)
    for _ in range(2):
        output = tiled_linear(x, weight, None, loop)
        assert isinstance(output, Tensor)
        output.backward(upstream)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 2 * upstream.float().t() @ x.float())  # type: ignore[attr-defined]


def test_fp32_accumulation_rounds_once() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512).bfloat16(), torch.randn(32, 512).bfloat16()
    exact = x.double() @ weight.double().t()

    def error(in_splits: int, fp32: bool) -> float:
        output = tiled_linear(x, weight, None, TileLoop(TileGrid(512, 32, in_splits), fp32_accumulate=fp32))
        assert isinstance(output, Tensor)
        return float((output.double() - exact).norm())

    assert error(16, fp32=True) <= 1.05 * error(1, fp32=False)
    assert error(16, fp32=False) > 1.5 * error(1, fp32=False)


def test_autocast() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiled_linear(x, weight, None, TileLoop(TileGrid(4, 8, 2, 2)))
    assert isinstance(output, Tensor) and output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_wrong_number_of_split_inputs_names_both() -> None:
    layer = TiledLinear(8, 4, in_splits=3, input_is_already_split=True)
    with pytest.raises(ValueError, match=r"split into 2 parts, but in_splits=3"):
        layer([torch.randn(5, 4), torch.randn(5, 4)])
    with pytest.raises(ValueError, match=r"split into 5 parts, but in_splits=3"):  # 5 tokens, not split
        layer(torch.randn(5, 8))
    loop = TileLoop(TileGrid(8, 4, 3))
    with pytest.raises(ValueError, match=r"split into 2 parts, but the layer has in_splits=3"):
        tiled_linear([torch.randn(5, 4), torch.randn(5, 4)], torch.randn(4, 8), None, loop)
    with pytest.raises(ValueError, match="input part 1 has 4 features, its tile takes 3"):
        tiled_linear([torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 1)], torch.randn(4, 8), None, loop)


def test_one_element_list_with_one_in_tile() -> None:
    layer = TiledLinear(4, 6, in_splits=1, out_splits=2, input_is_already_split=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer([x]), layer(x))


@pytest.mark.parametrize(("in_splits", "out_splits"), [(0, 1), (1, 0), (9, 1), (1, 7), (-1, 1)])
def test_bad_splits_raise_runtime_error(in_splits: int, out_splits: int) -> None:
    with pytest.raises(RuntimeError, match="is not within"):
        TiledLinear(8, 6, in_splits=in_splits, out_splits=out_splits)


def test_state_dict_keys_are_deepspeeds() -> None:
    layer = TiledLinear(4, 6, in_splits=2, out_splits=2)
    assert set(layer.state_dict()) == {
        "linears.0.0.weight", "linears.0.1.weight", "linears.0.1.bias",
        "linears.1.0.weight", "linears.1.1.weight", "linears.1.1.bias",
    }  # fmt: skip


def test_hooks_of_a_subclass_are_used() -> None:
    class Scaled(TiledLinear):
        def _split_global_input(self, input: Any, split_sizes: Any) -> Any:
            return split_tensor_along_last_dim(2 * input, split_sizes)

        def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
            return new_out if current_out is None else torch.maximum(current_out, new_out)

        def _combine_output_splits(self, outputs: Any) -> Any:
            assert isinstance(outputs, list) and len(outputs) == self.out_splits
            return torch.stack(outputs)

    layer = Scaled(4, 6, in_splits=2, out_splits=3, bias=False)
    x = torch.randn(5, 4)
    rows = [[2 * x[:, 2 * i : 2 * i + 2] @ tile.weight.t() for i, tile in enumerate(row)] for row in layer.linears]
    torch.testing.assert_close(layer(x), torch.stack([torch.maximum(*row) for row in rows]))


def test_tiles_that_are_shards_are_split_and_initialised_by_their_own_sizes() -> None:
    class HalfShard(torch.nn.Linear):
        """Stands for a row-parallel tile at TP=2: it holds half of its input features."""

        def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
            super().__init__(in_features // 2, out_features, bias=bias)

    layer = TiledLinear(20, 6, in_splits=4, linear_cls=HalfShard)  # global tiles of 5: local ones of 2
    shard = torch.nn.Linear(8, 6)
    layer.copy_params_from(shard)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), shard(x))
    with pytest.raises(ValueError, match=r"weight \(6, 20\) into tiles of \[6, 8\]"):
        layer.copy_params_from(torch.nn.Linear(20, 6))
    with pytest.raises(ValueError, match="has no bias"):
        layer.copy_params_from(torch.nn.Linear(8, 6, bias=False))


def test_split_tensor_along_last_dim() -> None:
    x = torch.randn(2, 7)
    parts = split_tensor_along_last_dim(x, [3, 4])
    assert [part.shape[-1] for part in parts] == [3, 4] and parts[1].data_ptr() == x[:, 3:].data_ptr()
    assert all(part.is_contiguous() for part in split_tensor_along_last_dim(x, [3, 4], contiguous_split_chunks=True))


def test_output_is_written_tile_by_tile() -> None:
    """No concatenation, and no tile outlives its turn."""
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    class Watched(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            output = super().forward(input)
            alive.append(weakref.ref(output))
            return output

    layer = TiledLinear(4, 12, out_splits=6, linear_cls=Watched)
    layer(torch.randn(3, 4)).sum().backward()
    assert len(alive) == 6

"""The tile loop of grouped experts against one expert after the other, in float64; and the choice of its tiles."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tiling.tiles.activation import Activation
from megatron_tiling.tiles.expert_groups import expert_groups
from megatron_tiling.tiles.expert_loop import ExpertsLoop
from megatron_tiling.tiles.expert_products import Products, one_by_one
from megatron_tiling.tiles.experts import Source, tiled_experts
from megatron_tiling.tiles.grid import tiles_worth_it
from tests.support.harness import Counter, peak_bytes

HIDDEN, FEATURES = 6, 11
ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def activated(pre: Tensor, bias: Tensor | None, scale: Tensor | None, gated: bool = True) -> Tensor:
    pre = pre if bias is None else pre + bias
    assert scale is not None
    if not gated:
        return F.gelu(pre) * scale[:, None]
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate) * up * scale[:, None]


GATED = Activation(True, activated)
PLAIN = Activation(False, lambda *operands: activated(*operands, gated=False))


class Case:
    """Parameters and inputs of some experts."""

    def __init__(
        self, rows: Sequence[int], activation: Activation = GATED, biased: bool = False, dtype: Any = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(sum(rows) + len(rows))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.rows, self.activation = rows, activation
        wide = activation.halves * FEATURES
        self.hidden, self.scale, self.grad = draw(sum(rows), HIDDEN), draw(sum(rows)), draw(sum(rows), HIDDEN).detach()
        self.fc1 = [draw(wide, HIDDEN) for _ in rows]
        self.biases = [draw(wide) for _ in rows] if biased else []
        self.fc2 = [draw(HIDDEN, FEATURES) for _ in rows]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.scale, *self.fc1, *self.biases, *self.fc2]

    def loop(self, tiles: int, keep: int = 0, **options: Any) -> ExpertsLoop:
        return ExpertsLoop(expert_groups(self.rows, FEATURES, tiles, keep), FEATURES, self.activation, **options)

    def tiled(self, loop: ExpertsLoop) -> Tensor:
        return tiled_experts(self.hidden, self.scale, self.fc1, self.biases, self.fc2, loop)

    def sequential(self) -> Tensor:
        outputs = []
        parts = zip(self.hidden.split(list(self.rows)), self.scale.split(list(self.rows)), strict=True)
        for expert, (x, scale) in enumerate(parts):
            bias = self.biases[expert] if self.biases else None
            outputs.append(self.activation.function(x @ self.fc1[expert].t(), bias, scale) @ self.fc2[expert].t())
        return torch.cat(outputs)

    def gradients(self, output: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(output, self.leaves, self.grad, materialize_grads=True, **options))


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11), (one - other).abs().max()


@settings(max_examples=60)
@given(ROWS, st.integers(1, 5), st.sampled_from([0, 1, 2, 5]), st.booleans(), st.booleans())
def test_as_one_after_the_other(rows: list[int], tiles: int, keep: int, gated: bool, biased: bool) -> None:
    case = Case(rows, GATED if gated else PLAIN, biased)
    output, expected = case.tiled(case.loop(tiles, keep)), case.sequential()
    assert_same([output, *case.gradients(output)], [expected, *case.gradients(expected)])


@given(ROWS, st.integers(1, 6), st.integers(0, 6), st.integers(1, 40))
def test_tiles_are_few_and_balanced(rows: list[int], tiles: int, keep: int, features: int) -> None:
    groups = expert_groups(rows, features, tiles, keep)
    segments = [segment for group in groups for segment in group.segments]
    assert [(expert, part.stop - part.start) for expert, part in segments] == [
        (expert, count) for expert, count in enumerate(rows) if count
    ]
    count = sum(group.count for group in groups)
    assert count <= tiles and sum(group.kept for group in groups) == min(keep, count)
    for group in groups:
        assert group.parts[0] == 0 and group.parts[-1] == features
        assert group.kept in (0, group.count) or len(group.segments) == len(group.tiles) == 1
        assert len(group.tiles) == 1 or (group.kept and len(group.columns) == 1)
        covered = [range(part.start, part.stop) for step in group.steps for _, part in step]
        assert [row for part in covered for row in part] == list(range(group.rows.start, group.rows.stop))


def test_even_routing_gives_even_tiles() -> None:
    for experts, tiles in ((64, 4), (8, 4), (4, 4)):
        groups = expert_groups([16] * experts, 768, tiles, 0)
        assert [len(group.segments) for group in groups] == [experts // tiles] * tiles
    assert [len(group.columns) for group in expert_groups([16] * 2, 768, 4, 0)] == [2, 2]
    assert expert_groups([16], 768, 3, 2)[0].parts == (0, 256, 512, 768)


@pytest.mark.parametrize("rows", [[5, 4, 0, 6], [3, 12]])
def test_gradients_into_main_grad(rows: list[int]) -> None:
    """Added to what is there; autograd gets none, or Megatron's mark."""
    case = Case(rows)
    expected = case.gradients(case.sequential())
    weights = [*case.fc1, *case.fc2]
    for weight in weights:
        weight.main_grad = torch.full_like(weight, 2.0)  # type: ignore[attr-defined]
    case.fc2[0].grad_added_to_main_grad = False  # type: ignore[attr-defined]
    case.tiled(case.loop(4, 1, fuse_wgrad=True)).backward(case.grad)
    assert_same([weight.main_grad - 2 for weight in weights], expected[2:])  # type: ignore[attr-defined]
    assert case.fc2[0].grad_added_to_main_grad  # type: ignore[attr-defined]
    assert all(weight.grad is None for weight in weights if weight is not case.fc2[0])


def test_main_grad_of_some_alone_is_not_added_to() -> None:
    case = Case([4, 5])
    case.fc1[0].main_grad = torch.zeros_like(case.fc1[0])  # type: ignore[attr-defined]
    output, expected = case.tiled(case.loop(2, fuse_wgrad=True)), case.sequential()
    assert_same(case.gradients(output), case.gradients(expected))
    assert not case.fc1[0].main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("rows", [[5, 0, 3, 14], [4, 4, 4, 4], [0, 0, 0, 0]])
def test_rows_gathered_again(rows: list[int], keep: int) -> None:
    """Tokens are kept in place of the rows that are copies of them; in the backward pass a tile's exist."""
    case = Case(rows)
    tokens = torch.randn(5, HIDDEN, dtype=torch.float64)
    indices = torch.arange(sum(rows)) * 7 % 5
    case.hidden = tokens[indices].requires_grad_()
    output = tiled_experts(
        case.hidden, case.scale, case.fc1, case.biases, case.fc2, case.loop(4, keep), Source(tokens, indices)
    )
    saved = {one.data_ptr() for one in output.grad_fn.saved_tensors if one is not None}  # type: ignore[union-attr]
    assert tokens.data_ptr() in saved and (case.hidden.data_ptr() not in saved or not sum(rows))
    expected = case.sequential()
    assert_same([output, *case.gradients(output)], [expected, *case.gradients(expected)])


@pytest.mark.parametrize("frozen", ["fc1", "fc2", "inputs"])
@pytest.mark.parametrize("keep", [0, 1, 4])
def test_frozen(frozen: str, keep: int) -> None:
    case = Case([5, 0, 3, 14], biased=True)
    for leaf in [case.hidden, case.scale] if frozen == "inputs" else getattr(case, frozen):
        leaf.requires_grad_(False)
    leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
    found, expected = (
        torch.autograd.grad(output, leaves, case.grad) for output in (case.tiled(case.loop(4, keep)), case.sequential())
    )
    assert_same(found, expected)


def test_two_backward_passes() -> None:
    case = Case([5, 0, 3, 14])
    expected = case.gradients(case.sequential())
    for keep in (3, 4):
        output = case.tiled(case.loop(4, keep))
        some = torch.autograd.grad(output, case.leaves[1:2], case.grad, retain_graph=True)
        assert_same(some, expected[1:2])
        for _ in range(2):
            assert_same(case.gradients(output, retain_graph=True), expected)
    for weight in case.fc1:
        weight.requires_grad_(False)
    output = case.tiled(case.loop(4, 4))
    output.backward(case.grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="--tiled-mlp-keep 0"):
        output.backward(case.grad)


def test_products() -> None:
    """fc1 runs once more for tiles that are not kept, and fc2 never."""
    counts = []
    for keep in (0, 1, 4):
        case = Case([3, 3, 3, 3])
        with Counter() as counter:
            case.tiled(case.loop(4, keep)).backward(case.grad)
        counts.append(counter.gemms)
    assert counts == [4 * 7, 4 * 7 - 1, 4 * 6]


def test_no_whole_intermediate() -> None:
    """What exists beside the output: a tile's, and the pre-activations that are kept."""
    case = Case([64, 64, 64, 64])
    element = 8 * FEATURES * 64
    with torch.no_grad():
        peaks = [peak_bytes(lambda tiles=tiles: case.tiled(case.loop(tiles))) for tiles in (1, 4)]  # type: ignore
    assert peaks[0] - case.grad.nbytes == 4 * (peaks[1] - case.grad.nbytes)
    for keep in (0, 2, 4):
        output = case.tiled(case.loop(4, keep))
        kept = [saved for saved in output.grad_fn.saved_tensors if saved is not None]  # type: ignore[union-attr]
        known = {leaf.data_ptr() for leaf in case.leaves}
        assert sum(saved.nbytes for saved in kept if saved.data_ptr() not in known) == keep * 2 * element


@pytest.mark.parametrize("keep", [0, 4])
def test_gradients_of_outputs_and_inputs_are_not_there_together(keep: int) -> None:
    """Where all tiles keep their pre-activations: autograd lets go of the output's before the input's is made."""
    case = Case([64, 64, 64, 64])
    case.hidden = torch.randn(256, 64, dtype=torch.float64, requires_grad=True)  # rows are larger than all else
    case.fc1 = [torch.randn(2 * FEATURES, 64, dtype=torch.float64) for _ in case.rows]
    case.fc2 = [torch.randn(64, FEATURES, dtype=torch.float64) for _ in case.rows]
    output = case.tiled(case.loop(4, keep)) * 2  # whose gradient is of the backward pass alone
    peak = peak_bytes(partial(output.backward, torch.ones_like(output)))
    assert (peak < 2 * case.hidden.nbytes) == (keep == 4)
    assert case.hidden.grad is not None


def test_experts_in_one_parameter_of_each_layer() -> None:
    """As Megatron's GroupedMLP has them, transposed."""
    case = Case([4, 0, 9, 2])
    whole = [torch.stack([weight.detach().t() for weight in weights]) for weights in (case.fc1, case.fc2)]
    parameters = [stacked.view(HIDDEN, -1).requires_grad_() for stacked in whole]

    def of_experts(shape: tuple[int, ...]) -> Any:
        return lambda tensors: [block.t() for block in tensors[0].view(shape)]

    views = {"fc1_of_experts": of_experts((4, HIDDEN, -1)), "fc2_of_experts": of_experts((4, -1, HIDDEN))}
    loop = replace(case.loop(4, 2), **views)
    output = tiled_experts(case.hidden, case.scale, parameters[:1], [], parameters[1:], loop)
    found = torch.autograd.grad(output, [case.hidden, case.scale, *parameters], case.grad)
    expected = case.gradients(case.sequential())
    for index, weights in enumerate((expected[2:6], expected[6:])):
        stacked = torch.stack([weight.t() for weight in weights]).view_as(found[2 + index])
        assert_same(found[2 + index : 3 + index], [stacked])
    assert_same(found[:2], expected[:2])


def test_bf16_sums_in_float32() -> None:
    """Of one expert in several tiles the input gradient is rounded once."""
    case = Case([40], dtype=torch.bfloat16)
    exact = Case([40])
    for leaf, other in zip(exact.leaves, case.leaves, strict=True):
        leaf.data = other.detach().double()
    wanted = exact.gradients(exact.sequential())[0]
    errors = []
    for fp32 in (False, True):
        found = case.gradients(case.tiled(case.loop(8, fp32_accumulate=fp32)))[0]
        errors.append(float((found.double() - wanted).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("keep", "numbers"),
    [(0, [2, 2, 1, 1, *[2] * 5, *[1] * 5]), (1, [2, 2, 1, 1, *[2] * 4, *[1] * 5]), (2, [3, 2, 1, 2, 2, 1, 1, 3, 3])],
)
def test_grouped_products(keep: int, numbers: list[int]) -> None:
    """They get the experts of a tile that have rows, fc1 those of all kept tiles; contiguous matrices."""
    calls = []

    def gemm(out: list[Tensor], a: list[Tensor], b: list[Tensor], *how: Any) -> None:
        assert all(tensor.is_contiguous() and tensor.numel() for tensor in (*out, *a, *b))
        calls.append(len(out))
        one_by_one(out, a, b, *how)

    case = Case([2, 0, 2, 4])
    output, expected = case.tiled(case.loop(2, keep, products=Products(gemm))), case.sequential()
    assert_same([output, *case.gradients(output)], [expected, *case.gradients(expected)])
    assert calls == numbers


@pytest.mark.parametrize(
    ("top_k", "ffn", "tiles"), [(2, 1536, 1), (8, 768, 1), (8, 1536, 2), (2, 14336, 4), (8, 14336, 4)]
)
def test_work_that_paid_for_its_tiles_on_gpus(top_k: int, ffn: int, tiles: int) -> None:
    """Of 8192 tokens, h=4096, SwiGLU."""
    assert tiles_worth_it(8192 * top_k, 3 * ffn * 4096, most=4) == tiles
    assert tiles_worth_it(0, 3 * ffn * 4096, most=4) == 1

"""Lazy logits stand for dense ones wherever somebody looks at them: values, gradients, in-place changes."""

import io

import pytest
import torch
from torch import Tensor

from megatron_tiling.resident.lazy_logits import LazyLogits, lazy_linear
from megatron_tiling.tiles.grid import TileGrid
from megatron_tiling.tiles.head import CrossEntropyLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from megatron_tiling.tiles.linear import TileLoop

TOKENS, VOCABULARY, HIDDEN = (4, 2), 9, 5


@pytest.fixture
def hidden():
    return torch.randn(*TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def weight():
    return torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)


def lazy(hidden: Tensor, weight: Tensor) -> LazyLogits:
    linear = TileLoop(TileGrid(HIDDEN, VOCABULARY, 1, 2))
    return lazy_linear(hidden, weight, linear, CrossEntropyLoop(HeadTiles(vocabulary=2), keep_largest=True))


class InPlaceCrossEntropy(torch.autograd.Function):
    """Does as Megatron's: takes logits into a function of its own and overwrites a copy of them."""

    @staticmethod
    def forward(ctx, logits):
        exponentials = logits.float().double()
        exponentials -= logits.max(dim=-1, keepdim=True).values
        torch.exp(exponentials, out=exponentials)
        ctx.save_for_backward(exponentials)
        return exponentials.sum(-1)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[..., None]


def changed_in_place(logits):
    logits.div_(2.0)
    logits[0] = 0.0
    return logits.exp()


def with_hooks(logits):
    logits.register_hook(lambda grad: grad * 2)
    logits.retain_grad()
    return logits.exp()


USES = {
    "transpose": lambda z: z.transpose(0, 1).contiguous(),
    "view": lambda z: z.view(-1, VOCABULARY)[:, :3],
    "index": lambda z: z[..., 0],
    "arithmetic": lambda z: 2 * z + z / 3 - 1,
    "softmax": lambda z: torch.log_softmax(z, dim=-1),
    "cat": lambda z: torch.cat([z, z]),
    "unbind": lambda z: z.unbind(0)[1],
    "topk": lambda z: z.topk(3).values,
    "max": lambda z: z.max(dim=-1).values,
    "float": lambda z: z.float(),
    "clone": lambda z: z.clone(),
    "twice": lambda z: z.exp().sum() + z.sum(),
    "autograd function": InPlaceCrossEntropy.apply,
    "scaled, autograd function": lambda z: InPlaceCrossEntropy.apply(z * 0.5),
    "in place": changed_in_place,
    "hooks": with_hooks,
    "checkpoint": lambda z: torch.utils.checkpoint.checkpoint(lambda q: q.exp().sum(), z, use_reentrant=False),
    "compiled": lambda z: torch.compile(lambda q: q.float().exp(), backend="eager")(z),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_any_use_equals_dense(use, hidden, weight):
    results = []
    for logits in (lazy(hidden, weight), hidden @ weight.t()):
        output = use(logits)
        assert type(output) is Tensor
        results.append((output, *torch.autograd.grad(output.sum(), (hidden, weight))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_products_with_numbers_stay_lazy(hidden, weight):
    labels = torch.randint(0, VOCABULARY, TOKENS)
    logits = 2 * (lazy(hidden, weight) * 0.5) / 4
    assert isinstance(logits, LazyLogits) and logits.pending
    dense = hidden @ weight.t() / 4
    expected = torch.nn.functional.cross_entropy(dense.flatten(0, 1), labels.flatten(), reduction="none")
    loss = logits.cross_entropy(labels)
    torch.testing.assert_close(loss.flatten(), expected)
    for one, other in zip(
        torch.autograd.grad(loss.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert logits.pending
    torch.testing.assert_close(logits.dense(), dense)
    assert not logits.pending


def test_the_loss_finds_the_largest_logits_too(hidden, weight):
    logits, dense = lazy(hidden, weight), hidden @ weight.t()
    logits.cross_entropy(torch.zeros(TOKENS, dtype=torch.int64))
    values, columns = logits.max(dim=-1)
    torch.testing.assert_close(values, dense.max(dim=-1).values.detach())
    assert torch.equal(columns, dense.argmax(dim=-1))
    assert torch.equal(torch.argmax(logits, dim=-1), columns)
    assert logits.pending
    assert torch.equal(logits.argmax(), dense.argmax()) and not logits.pending


def test_without_gradients(hidden, weight):
    with torch.no_grad():
        logits = lazy(hidden, weight)
        assert not logits.requires_grad
        torch.testing.assert_close(logits.transpose(0, 1), (hidden @ weight.t()).transpose(0, 1))


def test_looking_at_the_shape_makes_nothing(hidden, weight):
    logits = lazy(hidden, weight)
    assert logits.shape == (*TOKENS, VOCABULARY) and logits.dtype == torch.float64
    assert logits.is_contiguous() and logits.numel() == 72 and "pending=True" in repr(logits)
    assert logits.pending


def test_values_can_be_saved_and_listed(hidden, weight):
    dense = (hidden @ weight.t()).detach()
    assert lazy(hidden, weight).tolist() == dense.tolist()
    file = io.BytesIO()
    torch.save({"logits": lazy(hidden, weight)}, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file)["logits"], dense)

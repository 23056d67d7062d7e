"""Lazy logits: no tensor, and nobody's but the stock loss's."""

from typing import Any

import pytest
import torch

from megatron_tiling.resident.lazy_logits import LazyLogits, stock_caller
from megatron_tiling.resident.stock_code import is_stock
from megatron_tiling.tiles.head import HeadLoop
from megatron_tiling.tiles.head_cut import HeadTiles
from tests.support.launch import torchrun

TOKENS, VOCABULARY, HIDDEN = (4, 2), 9, 5


@pytest.fixture
def hidden():
    return torch.randn(*TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def weight():
    return torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)


def lazy(hidden, weight):
    return LazyLogits(hidden, weight, HeadLoop(HeadTiles(vocabulary_tiles=2), keep_largest=True))


def test_the_loss_of_scaled_logits_and_their_largest(hidden, weight):
    labels = torch.randint(0, VOCABULARY, TOKENS)
    logits, dense = lazy(hidden, weight) * 0.5 * 0.5, hidden @ weight.t() / 4
    expected = torch.nn.functional.cross_entropy(dense.flatten(0, 1), labels.flatten(), reduction="none")
    loss = logits.cross_entropy(labels)
    torch.testing.assert_close(loss.flatten(), expected)
    for one, other in zip(
        torch.autograd.grad(loss.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    values, columns = logits.max(dim=-1)
    torch.testing.assert_close(values, dense.max(dim=-1).values.detach())
    assert torch.equal(columns, dense.argmax(dim=-1)) and torch.equal(torch.argmax(logits, dim=-1), columns)
    assert logits.size(-1) == VOCABULARY


LOOKS: dict[str, Any] = {
    "the largest, before the loss": lambda z: z.max(dim=-1),
    "the largest of all": lambda z: torch.argmax(z),
    "the largest of each column": lambda z: torch.argmax(z, dim=0),
    "a method": lambda z: z.float(),
    "an attribute": lambda z: z.grad_fn,
    "an operator": lambda z: z / 2,
    "a function": lambda z: torch.logsumexp(z, dim=-1),
    "a function of two": lambda z: torch.add(torch.ones(1), z),
    "an index": lambda z: z[0],
    "a number": lambda z: float(z),
    "an autograd function": lambda z: torch.utils.checkpoint.checkpoint(torch.exp, z, use_reentrant=False),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_whoever_takes_them_for_a_tensor_is_told(look, hidden, weight):
    with pytest.raises(TypeError, match=r"tiled-linear-modules|LazyLogits"):
        look(lazy(hidden, weight))


def test_code_is_stock_by_where_it_lies():
    import functools

    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as stock

    name = "megatron.core.tensor_parallel.cross_entropy.vocab_parallel_cross_entropy"
    assert is_stock(stock, name)
    assert not is_stock(functools.wraps(stock)(lambda *args: stock(*args)), name)  # though it bears stock's name
    assert not is_stock(functools.partial(stock), name) and not is_stock(None, name)
    namespace = dict(stock.__globals__)
    exec("def vocab_parallel_cross_entropy(logits, target): ...", namespace)  # a patch of source text
    assert not is_stock(namespace["vocab_parallel_cross_entropy"], name)


def test_a_caller_that_is_not_megatron_gets_no_lazy_logits():
    import sys

    assert stock_caller(sys._getframe()) == ""


@pytest.mark.parametrize(("who", "check"), [("looks", "lazy_logits"), ("replaces the loss", "replaced_losses")])
def test_sees_dense(who, check):
    assert f"whoever {who} sees dense" in torchrun("-m", f"tests.resident.check_{check}", world=2)

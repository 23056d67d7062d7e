"""Whoever replaces a part of the loss gets what the dense model gives, and the table says that logits are whole.

    torchrun --standalone --nproc-per-node 2 -m tests.resident.check_replaced_losses

As check_lazy_logits.py; parts are replaced before the model is tiled, and after.
"""

import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any
from unittest import mock

import torch

from tests.resident.check_lazy_logits import CASE, TOLERANCE, compare, losses, results, tiled
from tests.resident.check_lm_head import RANK, build
from tests.support.harness import megatron, relative_error

Replacement = Callable[[Any], AbstractContextManager[Any]]
LANGUAGE_MODULE = "models.common.language_module.language_module"


def on_the_model(name: str, wrap: Callable[[Any], Callable[..., Any]]) -> Replacement:
    def replace(model: Any) -> AbstractContextManager[Any]:
        method = MethodType(wrap(getattr(model, name)), model)
        return mock.patch.object(model, name, method)

    return replace


def elsewhere(path: str, wrap: Callable[[Any], Callable[..., Any]]) -> Replacement:
    def replace(model: Any) -> AbstractContextManager[Any]:
        place, _, name = path.rpartition(".")
        owner = pkgutil.resolve_name(f"megatron.core.{place}")
        static = isinstance(vars(owner).get(name), staticmethod)
        wrapped = wrap(getattr(owner, name))
        return mock.patch.object(owner, name, staticmethod(wrapped) if static else wrapped)

    return replace


def capped(stock: Any) -> Callable[..., Any]:
    return lambda self, labels, logits: stock(labels, 0.5 * torch.tanh(logits / 0.5))


def skipped(stock: Any) -> Callable[..., Any]:
    return lambda self, labels, logits: (logits * 0).sum(dim=-1).transpose(0, 1)


def with_z_loss(stock: Any) -> Callable[..., Any]:
    return lambda self, labels, logits: (
        stock(self, labels, logits) + torch.logsumexp(logits.float(), dim=-1).square().t()
    )


def smoothed(stock: Any) -> Callable[..., Any]:
    return lambda *args, **options: stock(*args, **options, label_smoothing=0.1)


def doubled(stock: Any) -> Callable[..., Any]:
    return lambda *args, **options: 2 * stock(*args, **options)


def doubled_first(stock: Any) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> tuple[Any, ...]:
        first, *others = stock(*args, **options)
        return 2 * first, *others

    return both


def one_more(stock: Any) -> Callable[..., Any]:
    def step(*args: Any) -> tuple[Any, ...]:
        *others, loss = stock(*args)
        return *others, loss + 1

    return step


def halved_in_place(stock: Any) -> Callable[..., Any]:
    return lambda self, logits: logits.div_(2.0)


FUSED = {"loss_fusion": True}
REPLACEMENTS: dict[str, tuple[Replacement, dict[str, Any]]] = {
    "the loss of a model, capped": (on_the_model("compute_language_model_loss", capped), {}),
    "the loss of a model, skipped": (on_the_model("compute_language_model_loss", skipped), {}),
    "the scaling of a model": (on_the_model("_scale_logits", halved_in_place), {}),
    "the loss of the class": (
        elsewhere(f"{LANGUAGE_MODULE}.LanguageModule.compute_language_model_loss", with_z_loss),
        {},
    ),
    "the scaling of the class": (elsewhere(f"{LANGUAGE_MODULE}.LanguageModule._scale_logits", halved_in_place), {}),
    "the cross entropy": (elsewhere("tensor_parallel.vocab_parallel_cross_entropy", smoothed), {}),
    "its backward pass": (
        elsewhere("tensor_parallel.cross_entropy._VocabParallelCrossEntropy.backward", doubled_first),
        {},
    ),
    "a step of it": (
        elsewhere("tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_cross_entropy_loss", one_more),
        {},
    ),
    "the fused cross entropy": (elsewhere(f"{LANGUAGE_MODULE}.fused_vocab_parallel_cross_entropy", doubled), FUSED),
    "a step of the fused one": (elsewhere("fusions.fused_cross_entropy.calculate_gradients", doubled), FUSED),
}


def check_replacements() -> None:
    for name, (replace, changes) in REPLACEMENTS.items():
        case = CASE | changes
        if "scaling" in name and not hasattr(build(case), "_scale_logits"):
            continue  # before 0.17
        with replace(model := build(case)):
            dense = results(model, losses)
        stock = results(build(case), losses)
        errors = [relative_error(one, other) for one, other in zip(dense, stock, strict=True) if other.any()]
        assert max(errors) > 2 * TOLERANCE, f"{name}: makes no difference"
        with replace(model := build(case)):
            note = tiled(model)
            assert note.startswith("logits whole: "), f"{name}: {note}"
            compare(f"{name}, then tiled", results(model, losses), dense)
        model = build(case)
        assert tiled(model).startswith("loss in tiles of ")
        with replace(model):
            compare(f"{name}, of a tiled model", results(model, losses), dense)
        compare(f"{name}, and taken away again", results(model, losses), stock)


def check_subclasses() -> None:
    """A class with code of its own where logits pass keeps them whole, and the table says so."""
    own: dict[str, Any] = {
        "compute_language_model_loss": lambda self, labels, logits: logits.float().sum(-1).t(),
        "_postprocess": lambda self, hidden_states, **rest: self.output_layer(hidden_states)[0].float().sum(-1).t(),
    }
    for name, method in own.items():
        found = []
        for convert in (False, True):
            model = build(CASE)
            model.__class__ = type("Own", (type(model),), {name: method})
            if convert:
                note = tiled(model)
                assert note.startswith("logits whole: ") and ("Own" in note or name in note), note
            found.append(results(model, losses))
        compare(name, *found)
    model = build(CASE)
    model.config.config_logger_dir = "logged"
    assert tiled(model) == "logits whole: --config-logger-dir writes them"


def main() -> None:
    with megatron(tensor_model_parallel_size=2):
        from megatron_tiling.trainer.norm import allow_sequence_parallel

        allow_sequence_parallel()
        check_replacements()
        check_subclasses()
    if RANK == 0:
        print("whoever replaces the loss sees dense")


if __name__ == "__main__":
    main()

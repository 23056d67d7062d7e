"""Whoever looks at logits, hooks them or changes them gets what the dense model gives.

    torchrun --standalone --nproc-per-node 2 -m tests.resident.check_lazy_logits

Each case runs a stock GPTModel dense and tiled at TP=2 with sequence parallelism.
"""

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.resident.check_lm_head import OPTIONS, RANK, Whole, batch, build, tile_head
from tests.support.harness import megatron, relative_error

# bf16: stock's loss overwrites float32 logits, so that nobody else can use them
CASE = {name: values[0] for name, values in OPTIONS.items()} | {"dtype": torch.bfloat16, "sequence_parallel": True}
TOLERANCE = 2e-2


def tiled(model: Any, **settings: Any) -> str:
    from megatron_tiling.config import TilingConfig

    return tile_head(model, TilingConfig(modules=("output",), **settings))


def results(model: Any, use: Callable[[Any], Tensor]) -> list[Tensor]:
    """What ``use`` returns of a model, and the gradients of its sum."""
    model.zero_grad()
    output = use(model)
    if output.requires_grad:
        output.float().sum().backward()
    grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [output.detach(), *grads]


def compare(name: str, ours: list[Tensor], dense: list[Tensor]) -> None:
    for one, other in zip(ours, dense, strict=True):
        error = relative_error(one, other)
        assert error <= TOLERANCE, f"{name}: error {error:.1e}"


def losses(model: Any) -> Tensor:
    loss: Tensor = model(**batch())
    return loss


def processor(process: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
    """``process(logits, labels, loss)`` as an output processor of GPTModel, which 0.16 and 0.17 have not."""

    def outside(hidden_states: Tensor, output_layer: Any, output_weight: Any, labels: Tensor, **rest: Any) -> Tensor:
        logits, _ = output_layer(hidden_states, weight=output_weight)
        assert type(logits) is Tensor
        return process(logits, labels, rest["compute_language_model_loss"])

    return lambda model: model(**batch(), output_processor=outside)


def hooked(logits: Tensor, labels: Tensor, loss: Any) -> Tensor:
    logits.register_hook(lambda grad: grad * 0.5)
    losses: Tensor = loss(labels, logits)
    return losses


def turned_in_place(logits: Tensor, labels: Tensor, loss: Any) -> Tensor:
    return logits.transpose_(0, 1).exp()


def seen_by_one_rank(logits: Tensor, labels: Tensor, loss: Any) -> Tensor:
    if RANK == 0:
        assert logits.max().isfinite() and isinstance(logits[0, 0].tolist(), list)
        torch.save(logits, io.BytesIO())
    losses: Tensor = loss(labels, logits)
    return losses


def smoothed_by_megatron(logits: Tensor, labels: Tensor, loss: Any) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    losses: Tensor = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), label_smoothing=0.1)
    return losses


def kept_while_weights_change(model: Any) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad():
        processor(lambda logits, labels, loss: kept.append(logits) or logits.sum())(model)
        for parameter in model.parameters():
            parameter.data.mul_(2.0)
    return kept[0].float() + 0


def layer_hooked(model: Any) -> Tensor:
    seen: list[Tensor] = []
    with removed(model.output_layer.register_forward_hook(lambda layer, args, output: seen.append(output[0]))):
        return losses(model) + seen[0].square().mean()


def all_modules_hooked(model: Any) -> Tensor:
    seen: list[Tensor] = []
    see = torch.nn.modules.module.register_module_forward_hook

    def of_the_head(layer: Any, args: Any, output: Any) -> None:
        if layer is model.output_layer:
            seen.append(output[0])

    with removed(see(of_the_head)):
        return losses(model) + seen[0].square().mean()


def halfway(model: Any) -> Tensor:
    """Logits of a layer within the model, taken while the model runs."""
    seen: list[Tensor] = []
    hook = model.decoder.layers[0].register_forward_hook(
        lambda layer, args, output: seen.append(model.output_layer(output[0])[0])
    )
    with removed(hook):
        return losses(model) + seen[0].square().mean()


def wrapped_forward(model: Any) -> Tensor:
    forward = model.output_layer.forward

    def doubled(*args: Any, **options: Any) -> Any:
        logits, bias = forward(*args, **options)
        return 2 * logits, bias

    with mock.patch.object(model.output_layer, "forward", doubled):
        return losses(model)


def called_directly(model: Any) -> Tensor:
    hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits: Tensor = model.output_layer(hidden, weight=None)[0]
    return logits.exp()


def borrowed(model: Any) -> Tensor:
    """Another model, which is dense, with this one's output layer."""
    other = build(CASE)
    other.output_layer = model.output_layer
    return losses(other)


@contextlib.contextmanager
def removed(handle: Any) -> Iterator[None]:
    yield
    handle.remove()


def without_gradients(mode: Callable[[], Any]) -> Callable[[Any], Tensor]:
    def use(model: Any) -> Tensor:
        with mode():
            return losses(model.eval()).clone()

    return use


USES: dict[str, Callable[[Any], Tensor]] = {
    "a hook on logits": processor(hooked),
    "turned in place": processor(turned_in_place),
    "one rank looks": processor(seen_by_one_rank),
    "label smoothing": processor(smoothed_by_megatron),
    "z-loss": processor(
        lambda logits, labels, loss: loss(labels, logits) + torch.logsumexp(logits.float(), -1).square().t()
    ),
    "kept while weights change": kept_while_weights_change,
    "a hook on the layer": layer_hooked,
    "a hook on all modules": all_modules_hooked,
    "logits of a layer within": halfway,
    "the layer's forward, wrapped": wrapped_forward,
    "the layer, called": called_directly,
    "the layer in another model": borrowed,
    "no labels": lambda model: model(**batch() | {"labels": None}).exp(),
    "gathered": lambda model: model(**batch() | {"labels": None}, runtime_gather_output=True).exp(),
    "gathered, with labels": lambda model: model.output_layer(torch.ones(6, 2, 32).bfloat16(), None, True)[0].exp(),
    "no_grad": without_gradients(torch.no_grad),
    "inference_mode": without_gradients(torch.inference_mode),
}


def has_processors() -> bool:
    """Whether this Megatron's models take output processors: from 0.18 on."""
    from megatron.core.models.gpt import GPTModel

    return "output_processor" in inspect.signature(GPTModel.forward).parameters


def check_uses() -> None:
    for name, use in USES.items():
        needs_processor = use is kept_while_weights_change or use.__qualname__.startswith("processor.")
        if needs_processor and not has_processors():
            continue
        dense, ours = build(CASE), build(CASE)
        assert tiled(ours).startswith("loss in tiles of ")
        compare(name, results(ours, use), results(dense, use))


# --- what stays lazy ------------------------------------------------------------------------------------------------


def check_prediction_heads() -> None:
    """Their losses, which stock computes itself, stay tiled beside a processor; with a loss of others they do not."""
    from megatron.core.transformer import multi_token_prediction

    def heads_alone(model: Any) -> Tensor:
        hidden: Tensor = model(**batch(), output_processor=lambda hidden_states, **rest: hidden_states)
        return hidden

    case = CASE | {"prediction_heads": 2}
    process = getattr(multi_token_prediction, "process_mtp_loss", None)
    if process is None:
        return  # 0.16
    dense, ours = build(case), build(case)
    tiled(ours, head_tokens=5)
    if has_processors():
        found = []
        for model in (dense, ours):
            with Whole() as whole:
                found.append(results(model, heads_alone))
            assert bool(whole.seen) == (model is dense)
        compare("prediction heads", *reversed(found))

    def elsewhere(model: Any, **changes: Any) -> Tensor:
        hidden = torch.randn(18, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        inputs = batch()
        arguments: dict[str, Any] = {
            "hidden_states": hidden, "labels": inputs["labels"], "loss_mask": None, "output_layer": model.output_layer,
            "output_weight": None, "runtime_gather_output": None, "is_training": False, "config": model.config,
            "compute_language_model_loss": model.compute_language_model_loss,
        }  # fmt: skip
        process(**arguments | changes).sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    for changes in (
        {"compute_language_model_loss": lambda labels, logits: logits.float().square().sum(-1).t()},
        {"scale_logits_fn": lambda logits: torch.tanh(logits / 3)},
    ):
        compare("a loss of others", [elsewhere(ours, **changes)], [elsewhere(dense, **changes)])


def check_backward_passes() -> None:
    """Twice through one graph, and under anomaly detection, with weight gradients fused."""
    for anomaly in (False, True):
        found = []
        for fuse_wgrad in (False, True):
            model = build(CASE | {"tied": not anomaly})
            assert tiled(model, fuse_wgrad=fuse_wgrad).startswith("loss in tiles of ")
            weight = model.output_layer.weight if anomaly else model.shared_embedding_or_output_weight()
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
            with torch.autograd.set_detect_anomaly(anomaly):
                loss = losses(model).sum()
                loss.backward(retain_graph=True)
                loss.backward()
            assert weight.grad_added_to_main_grad == fuse_wgrad
            found.append(weight.main_grad + weight.grad.float())
        compare("two backward passes", *([one] for one in found))


def main() -> None:
    with megatron(tensor_model_parallel_size=2):
        from megatron_tiling.trainer.norm import allow_sequence_parallel

        allow_sequence_parallel()
        check_uses()
        check_prediction_heads()
        check_backward_passes()
    if RANK == 0:
        print("whoever looks sees dense")


if __name__ == "__main__":
    main()

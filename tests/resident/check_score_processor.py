"""Scores of a stock GPTModel through an output processor, at one tensor-parallel size: as from its whole logits.

    torchrun --standalone --nproc-per-node TP -m tests.resident.check_score_processor

Values, every gradient and prediction losses, for tiled and stock output layers, over all pairs of options.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_tiling import TilingConfig, score_processor, tile
from tests.resident.check_lm_head import BATCH, RANK, SEQUENCE, TP, VOCABULARY, batch, build
from tests.support.harness import Counter, all_pairs, megatron, naming, relative_error

OPTIONS: dict[str, list[Any]] = {
    "tiled": [False, True],
    "sequence_parallel": [False, True],
    "tied": [False, True],
    "prediction_heads": [0, 1],
    "labels": [False, True],
    "main_grad": [False, True],
    "scale": [None, 0.25],
    "softcap": [None, 4.0],
    "temperature": [1.0, 0.7],
    "k": [None, 3],
    "masked": [False, True],
    "wrapped": [False, True],
}
REST = {"detach_heads": False, "fp16_lm_cross_entropy": False, "per_token_loss": False, "loss_fusion": False}


def columns(k: int | None) -> Tensor:
    shape = (BATCH, SEQUENCE) if k is None else (BATCH, SEQUENCE, k)
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(6))


def plain(logits: Tensor, case: dict[str, Any], chosen: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if case["softcap"] is not None:
        logits = case["softcap"] * torch.tanh(logits / case["softcap"])
    log_p = (logits / case["temperature"]).log_softmax(-1)
    log_probs = log_p.gather(-1, chosen if case["k"] else chosen[..., None])
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        log_probs, entropy = log_probs * mask[..., None], entropy * mask
    return log_probs if case["k"] else log_probs.squeeze(-1), entropy


def run(model: Any, case: dict[str, Any], processed: bool) -> dict[str, Tensor]:
    """Log-probabilities, entropy and all gradients, by name."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    for parameter in model.parameters():
        parameter.grad = None
        if case["main_grad"]:
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
    inputs = batch()
    labels, chosen = inputs.pop("labels"), columns(case["k"])
    if case["labels"]:
        inputs["labels"] = labels
    mask = inputs["loss_mask"].bool() if case["masked"] else None
    # A stock layer fuses in its own calls too, those of prediction heads, and lacks apex's kernel here.
    fuses = case["main_grad"] and (case["tiled"] or not case["prediction_heads"])
    model.output_layer.gradient_accumulation_fusion = processed and fuses
    if processed:
        options = {"softcap": case["softcap"], "temperature": case["temperature"]}
        processor = score_processor(chosen, entropy=True, top_k=2, mask=mask, **options)
        whole = wrapped(model, case)
        with Counter() as counter:
            scores = whole(**inputs, output_processor=processor)
        assert counter.collectives.get("allreduce_", 0) >= 2 * (TP > 1)
        found = scores.log_probs, scores.entropy
        assert scores.top_columns.shape == (BATCH, SEQUENCE, 2)
    else:

        def logits_of(*, hidden_states, output_layer, output_weight, scale_logits, **unused):  # type: ignore
            logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
            return gather_from_tensor_model_parallel_region(logits).transpose(0, 1)

        found = plain(model(**inputs, output_processor=logits_of), case, chosen, mask)
    generator = torch.Generator().manual_seed(8)
    torch.autograd.backward(found, [torch.rand(output.shape, generator=generator) for output in found])
    values = {"log_probs": found[0].detach(), "entropy": found[1].detach()}
    for name, parameter in model.named_parameters():
        values[name] = torch.zeros_like(parameter)
        added = case["main_grad"] and parameter.grad_added_to_main_grad
        if added:
            values[name] += parameter.main_grad
        if parameter.grad is not None and (not added or getattr(parameter, "zero_out_wgrad", False)):
            values[name] += parameter.grad
    return values | {
        f"mtp {name}": value for name, value in MTPLossLoggingHelper.tracker.items() if isinstance(value, Tensor)
    }


def wrapped(model: Any, case: dict[str, Any]) -> Any:
    """As Megatron's trainer hands a model out."""
    if not case["wrapped"]:
        return model
    from megatron.core.transformer.module import Float16Module

    wrapper = Float16Module.__new__(Float16Module)
    torch.nn.Module.__init__(wrapper)
    wrapper.config, wrapper.vp_size, wrapper.vp_stage, wrapper.pg_collection = model.config, None, None, None
    wrapper.add_module("module", model)
    wrapper.float16_convertor = lambda value: value
    return wrapper


def check(case: dict[str, Any]) -> None:
    model = build(REST | case | {"dtype": torch.float32})
    expected = run(model, case, processed=False)
    if case["tiled"]:
        tile(model, TilingConfig(modules=("output",), splits={"output": (1, 3)}))
    for _ in range(2):
        found = run(model, case, processed=True)
        assert found.keys() == expected.keys()
        for name in expected:
            error = relative_error(found[name], expected[name])
            assert error <= 5e-6, f"{name}: error {error:.2e}"


def check_refusals() -> None:
    """Whoever would look at logits is named; pre-hooks run, and may gather the weight."""
    case = {name: values[0] for name, values in OPTIONS.items()}

    def hooked(model: Any) -> None:
        model.output_layer.register_forward_hook(lambda *args: None)

    def scaled(model: Any) -> None:
        model._scale_logits = lambda logits: logits * 2

    def replaced(model: Any) -> None:
        model.output_layer.forward = lambda *args, **kwargs: None

    def wrapped_layer(model: Any) -> None:
        model.output_layer.__class__ = type("Adapter", (type(model.output_layer),), {})

    for change, words in (
        (hooked, "hooks look at logits"),
        (scaled, "code that is not Megatron's scales logits"),
        (replaced, "a forward of its own"),
        (wrapped_layer, "is a Adapter, not Megatron's own"),
    ):
        model = build(REST | case | {"dtype": torch.float32})
        change(model)
        try:
            model(**batch(), output_processor=score_processor(columns(None)))
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")
    model = build(REST | case | {"dtype": torch.float32})
    calls: list[Any] = []
    model.output_layer.register_forward_pre_hook(lambda layer, args: calls.append(layer))
    model(**batch(), output_processor=score_processor(columns(None)))
    assert calls == [model.output_layer] and "forward" not in vars(model.output_layer)


def main() -> None:
    with megatron(tensor_model_parallel_size=TP):
        check_refusals()
        cases = all_pairs(OPTIONS)
        for case in cases:
            with naming(f"rank {RANK}, {case}"):
                check(case)
    if RANK == 0:
        print(f"{len(cases)} cases at TP={TP}: scores equal those of whole logits")


if __name__ == "__main__":
    main()

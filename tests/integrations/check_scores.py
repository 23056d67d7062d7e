"""Trainers' own functions for log-probabilities and entropies, on logits of a dense model and on those of a tiled one.

    torchrun --standalone --nproc-per-node TP -m tests.integrations.check_scores TRAINER

TRAINER is slime, miles or verl; its package is on the path. Values and every gradient: in float64 for verl, in float32,
which the others insist on; no tensor is as large as all logits. Dense miles takes Megatron's fused loss, whose gradient
is rounded to bfloat16. What their modules import beside is stubbed: ``STUBS``.
"""

import copy
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiling import TilingConfig, tile
from megatron_tiling.integrations.miles import MILES
from megatron_tiling.integrations.policy_logits import PolicyLogits, defer_logits, hook_scores
from megatron_tiling.integrations.slime import SLIME
from tests.integrations import stubs
from tests.integrations.check_bridge import groups_of
from tests.resident import check_lm_head
from tests.resident.check_lm_head import HIDDEN, RANK, SEQUENCE, TP, VOCABULARY, build
from tests.support.harness import all_pairs, megatron, relative_error

STUBS = ("codetiming", "httpx", "orjson", "ray", "sglang", "sglang_router", "tensordict")
OPTIONS: dict[str, list[Any]] = {
    "sequence_parallel": [False, True],
    "tied": [False, True],
    "scale": [None, 0.25],
    "entropy": [False, True],
    "temperature": [1.0, 0.7],
    "entropy_gradient": [False, True],
    "chunk": [-1, 5],
}
FIXED = {"prediction_heads": 0, "detach_heads": False, "fp16_lm_cross_entropy": False, "loss_fusion": False}
FIXED |= {"per_token_loss": False, "dtype": torch.float32}
check_lm_head.LOGITS = SEQUENCE * VOCABULARY // TP  # of one sequence
LENGTHS, RESPONSES = [7, 5], [3, 4]
TILING = TilingConfig(3, ("output",), head_tokens=5, splits={"output": (1, 3)})

Scored = tuple[list[Tensor], list[Tensor] | None, Any]


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (1, SEQUENCE), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any) -> Any:
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    return model(tokens(), torch.arange(SEQUENCE)[None], mask)


def responses(get: Callable[..., Any], case: dict[str, Any], model: Any) -> Any:
    """What ``get_log_probs_and_entropy`` makes of two samples, packed; and the logits."""
    logits = logits_of(model)
    args = Namespace(
        rollout_temperature=case["temperature"],
        log_probs_chunk_size=case["chunk"],
        entropy_coef=0.1 * case["entropy_gradient"],
        allgather_cp=False,
        qkv_format="thd",
        true_on_policy_mode=False,
    )
    samples = {
        "unconcat_tokens": list(tokens()[0].split(LENGTHS)),
        "total_lengths": LENGTHS,
        "response_lengths": RESPONSES,
        "with_entropy": case["entropy"],
    }
    return get(logits, args=args, **samples), logits


def slime(case: dict[str, Any], model: Any) -> Scored:
    get = importlib.import_module("slime.backends.megatron_utils.loss").get_log_probs_and_entropy
    (_, found), logits = responses(get, case, model)
    return found["log_probs"], found.get("entropy"), logits


def miles(case: dict[str, Any], model: Any) -> Scored:
    module: Any = importlib.import_module("miles.backends.training_utils.loss_hub.logit_processors")
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    module.get_parallel_state = lambda: Namespace(tp=Namespace(group=group), cp=Namespace(size=1, rank=0))

    def get(*args: Any, **kwargs: Any) -> Any:
        return module.get_log_probs_and_entropy(*args, entropy_requires_grad=case["entropy_gradient"], **kwargs)

    found, logits = responses(get, case, model)
    return found["log_probs"], found.get("entropy"), logits


def verl(case: dict[str, Any], model: Any) -> Scored:
    """Its fused forward pass; of the dense model, whose kernel there needs a GPU, Megatron's logits.

    That kernel and the code around it sum the gradient of hidden states with sequence parallelism alone.
    """
    if type(model.output_layer).__name__ != "TiledOutputLayer":
        return plain(case, model)
    module = importlib.import_module("verl.models.mcore.model_forward_fused")
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    output = module._fused_GPTModel_forward(
        model,
        tokens(),
        torch.arange(SEQUENCE)[None],
        mask,
        labels=tokens().roll(-1, 1),
        temperature=case["temperature"],
    )
    return [output.log_probs], [output.entropy], None


def plain(case: dict[str, Any], model: Any) -> Scored:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = gather_from_tensor_model_parallel_region(logits_of(model).squeeze(0) / case["temperature"])
    log_p, labels = whole.log_softmax(-1), tokens().roll(-1, 1)
    return [log_p.gather(1, labels.reshape(-1, 1)).squeeze(1)], [-(log_p.exp() * log_p).sum(-1)], None


def step(run: Callable[[dict[str, Any], Any], Scored], case: dict[str, Any], model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    log_probs, entropies, logits = run(case, model)
    assert isinstance(logits, PolicyLogits) == hasattr(model.forward, "__wrapped__") or logits is None
    generator = torch.Generator().manual_seed(5)
    values = [*log_probs, *(entropies or ())]
    differentiable = [value for value in values if value.requires_grad]
    assert len(differentiable) == len(values) or not case["entropy_gradient"]
    loss = sum((value * torch.rand(value.shape, generator=generator)).sum() for value in differentiable)
    (loss if logits is None else loss + 0 * logits.sum()).backward()
    named = {f"value {index}": value.detach() for index, value in enumerate(values)}
    return named | {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def check(trainer: str, run: Callable[[dict[str, Any], Any], Scored], options: dict[str, list[Any]]) -> None:
    for case in all_pairs(options):
        model = build(case | FIXED)
        if trainer == "verl":
            model.double()
        with check_lm_head.Whole() as whole:
            expected = step(run, case, model)
        assert whole.seen
        tile(model, TILING)
        if trainer != "verl":
            assert defer_logits(model) == ""
        with check_lm_head.Whole() as whole:
            found = step(run, case, model)
        assert not whole.seen, case
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            error = relative_error(found[name], one)
            limit = {"verl": 1e-10, "slime": 5e-6, "miles": 1e-6 if name.startswith("value") else 4e-3}[trainer]
            assert error < limit, (name, error, case)


def check_lazy() -> None:
    """What else is asked of logits that are not made: an error; and a loss, or several sequences, as ever."""
    model = build({**{name: values[0] for name, values in OPTIONS.items()}, **FIXED})
    expected = logits_of(model)
    tile(model, TILING)
    assert defer_logits(model) == ""
    logits = logits_of(model)
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert relative_error(logits.squeeze(0).whole(), expected[0]) < 1e-6
    flat, rows = logits.squeeze(0), torch.tensor([1, 2, 7, 8])
    some = torch.cat([flat[1:5][:2], flat[7:9]], dim=0)  # of context parallelism
    assert some.shape == (4, len(model.output_layer.weight))
    assert relative_error(some.whole(), expected[0][rows]) < 1e-6
    wanted, found = (view.scores(tokens()[0][chosen], True) for view, chosen in ((flat, slice(None)), (some, rows)))
    assert relative_error(found.log_probs, wanted.log_probs[rows]) < 1e-6
    assert relative_error(found.entropy, wanted.entropy[rows]) < 1e-6
    twice = [flat[1:5], flat[3:9]]
    for use in (
        lambda: logits.exp(),
        lambda: torch.exp(logits),
        lambda: 1 * logits.sum(),
        lambda: torch.cat(twice, dim=0),
    ):
        with pytest.raises(TypeError, match="never exist"):
            use()
    positions, mask = torch.arange(SEQUENCE)[None], torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    assert model(tokens(), positions, mask, labels=tokens()).shape == (1, SEQUENCE)
    two = tokens().expand(2, -1)
    assert isinstance(model(two, positions.expand(2, -1), mask), Tensor)
    model.output_layer.register_forward_hook(lambda *arguments: None)
    assert isinstance(logits_of(model), Tensor)
    model.output_layer._forward_hooks.clear()
    other = copy.deepcopy(model, groups_of(model))
    torch.nn.init.zeros_(other.output_layer.weight)
    assert not logits_of(other).squeeze(0).whole().any() and logits_of(model).squeeze(0).whole().any()
    model.output_layer = torch.nn.Linear(HIDDEN, 1)
    assert defer_logits(model).startswith("the output layer is not tiled")


def check_wrapped() -> None:
    """In bf16, behind Megatron's wrapper that makes outputs float32."""
    from megatron.core.transformer.module import Float16Module

    case = {**{name: values[0] for name, values in OPTIONS.items()}, **FIXED, "dtype": torch.bfloat16}
    model = build(case)
    wrapped = Float16Module(model.config, model)
    expected = logits_of(wrapped).squeeze(0)
    tile(model, TILING)
    assert defer_logits(model) == ""
    logits = logits_of(wrapped)
    assert isinstance(logits, PolicyLogits) and logits.dtype == expected.dtype == torch.float32
    assert relative_error(logits.squeeze(0).whole(), expected) < 1e-2
    scores, log_p = logits.squeeze(0).scores(tokens()[0], True), expected.log_softmax(-1)
    assert TP > 1 or relative_error(scores.log_probs, log_p.gather(1, tokens()[0][:, None])) < 1e-2


def check_kept_columns() -> None:
    """slime's top-p replay, whose columns are masked in whole logits."""
    from megatron.core import parallel_state

    module: Any = importlib.import_module(SLIME.scores)
    model = build({**{name: values[0] for name, values in OPTIONS.items()}, **FIXED})
    dense = logits_of(model).squeeze(0)
    tile(model, TILING)
    assert defer_logits(model) == ""
    group = parallel_state.get_tensor_model_parallel_group()
    kept = torch.rand(dense.shape, generator=torch.Generator().manual_seed(8)) < 0.5
    wanted, found = (
        module.calculate_log_probs_and_entropy(logits, tokens()[0], group, True, log_prob_keep_mask=kept)
        for logits in (dense, logits_of(model).squeeze(0))
    )
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-6


def main() -> None:
    trainer = sys.argv[1]
    stubs.install(*STUBS)
    with megatron(tensor_model_parallel_size=TP):
        if trainer == "verl":
            check_verl()
        else:
            hooked = SLIME if trainer == "slime" else MILES
            check_lazy()
            check_wrapped()
            for _ in range(2):
                hook_scores(hooked.scores, hooked.tested, hooked.entropy_gradient, hooked.whole_with)
            check(trainer, slime if trainer == "slime" else miles, OPTIONS)
            if trainer == "slime":
                check_kept_columns()
        if RANK == 0:
            print(f"{trainer} passed at TP={TP}", flush=True)


def check_verl() -> None:
    importlib.import_module("megatron_tiling.integrations.verl")  # MEGATRON_TILING is set
    options = {name: OPTIONS[name] for name in ("sequence_parallel", "tied", "temperature")} | {"scale": [None]}
    check("verl", verl, options | {"entropy_gradient": [True], "entropy": [True]})


if __name__ == "__main__":
    main()

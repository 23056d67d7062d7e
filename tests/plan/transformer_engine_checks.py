"""Checks of the planner's TransformerEngine, one a process, which stands for a GPU from its start to its end."""

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.plan_accuracy import MIB, Planner

TP, TOKENS, HIDDEN, FFN = 2, 1024, 256, 512
BLOCKS = 2 * 8 * 512 / MIB  # of the caching allocator, which small tensors are rounded up to


def mib(*elements: int) -> float:
    """Of bf16."""
    return 2 * sum(elements) / MIB


def linear_layers_under_sequence_parallelism() -> None:
    """fc1 with its norm, and fc2, at TP=2: what they keep, and what the backward pass of each holds at most."""
    planner = Planner(TP)  # before Megatron is imported
    import torch
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=2, normalization="RMSNorm",
        params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False, gradient_accumulation_fusion=True,
        tensor_model_parallel_size=TP, sequence_parallel=True,
    )  # fmt: skip
    options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    options |= {"skip_bias_add": False, "is_expert": False}
    part, whole, wide = TOKENS // TP * HIDDEN, TOKENS * HIDDEN, TOKENS * FFN // TP
    with planner.simulation():
        fc1 = te.TELayerNormColumnParallelLinear(HIDDEN, FFN, gather_output=False, **options)
        fc2 = te.TERowParallelLinear(FFN, HIDDEN, input_is_parallel=True, **options)
        for layer in (fc1, fc2):
            for parameter in layer.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
                parameter.grad_added_to_main_grad = False

        def tensor(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

        shapes = (TOKENS // TP, 1, HIDDEN), (TOKENS, 1, FFN // TP)
        for layer, given, kept, made in (
            # the norm's output; its gradient and input, whole, and this rank's part of the gradient
            (fc1, shapes[0], mib(part), mib(whole, whole, part)),
            # nothing but the input; the gradients of the output, whole, and of the input
            (fc2, shapes[1], 0.0, mib(whole, wide)),
        ):
            check_layer(planner, layer, tensor(*given), kept, made)


def check_layer(planner: Planner, layer: Any, x: Any, kept: float, made: float) -> None:
    import torch

    layer(x)[0].sum().backward()  # makes what is held for good
    x.grad = None
    before = planner.tracker.bytes
    output = layer(x)[0]
    near(f"{type(layer).__name__}, kept", (planner.tracker.bytes - before - output.nbytes) / MIB, kept)
    grad = torch.zeros_like(output)
    near(f"{type(layer).__name__}, backward", planner.peak(lambda: output.backward(grad)), made)


def near(what: str, found: float, expected: float) -> None:
    if not expected <= found <= expected + BLOCKS:
        raise AssertionError(f"{what}: {found:.4f} MiB, expected {expected:.4f}")


def layers_in_fp8() -> None:
    """fc1 with its norm, and fc2, at TP=2: what they keep of their inputs, and both layouts in the backward pass."""
    planner = Planner(TP)
    import torch
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.transformer import TransformerConfig

    whole, wide, narrow = mib(TOKENS * HIDDEN), mib(TOKENS * FFN // TP), mib(TOKENS * HIDDEN) / 2
    for recipe, scatters in itertools.product(("tensorwise", "delayed"), (False, True)):
        part = TP if scatters else 1
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=2, normalization="RMSNorm",
            params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False, gradient_accumulation_fusion=True,
            tensor_model_parallel_size=TP, sequence_parallel=scatters, fp8="hybrid", fp8_recipe=recipe,
        )  # fmt: skip
        options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
        options |= {"skip_bias_add": False, "is_expert": False}
        with planner.simulation():
            fc1 = te.TELayerNormColumnParallelLinear(HIDDEN, FFN, gather_output=False, **options)
            fc2 = te.TERowParallelLinear(FFN, HIDDEN, input_is_parallel=True, **options)
            # columns; both layouts of the gradient, the input's gradient and the norm's, without the columns
            of_fc1 = narrow, wide + 2 * whole - narrow
            if scatters:  # a part's rows; also all rows, and their columns, when the weight's gradient is made
                of_fc1 = narrow / TP, wide + 2 * narrow + whole + whole / TP
            for layer, tokens, width, (kept, made) in (
                (fc1, TOKENS // part, HIDDEN, of_fc1),
                (fc2, TOKENS, FFN // TP, (wide / 2, whole + wide)),
            ):
                for parameter in layer.parameters():
                    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
                    parameter.grad_added_to_main_grad = False

                def in_fp8(x: Any, layer: Any = layer, config: Any = config) -> Any:
                    with get_fp8_context(config, 0):
                        return layer(x)

                x = torch.zeros(tokens, 1, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                check_layer(planner, in_fp8, x, kept, made)


def measured_peaks() -> None:
    """Of MLPs, dense, recomputed and tiled, in bf16 and in FP8."""
    from benchmarks.plan_accuracy import of_mlp, of_mlp_fp8, read

    planner = Planner()
    rows = [*of_mlp(planner, read("2026-11-27-mlp-te"), 1), *of_mlp_fp8(planner, read("2026-11-27-mlp-fp8-columns"), 1)]
    assert len(rows) == 16 + 2 * 27
    for name, predicted, measured, _ in rows:
        if abs(predicted / measured - 1) > 0.002:
            raise AssertionError(f"{name}: {predicted:.1f} MiB, measured {measured:.1f}")


def measured_peaks_under_tensor_parallelism() -> None:
    """Of MLPs, transformer layers and GPTs, dense, tiled, and with communication behind products."""
    from benchmarks.plan_accuracy import of_tp_overlap, of_whole_model, read

    planner = Planner(4)
    rows = [
        row for what in ("", "layer-") for row in of_tp_overlap(planner, read(f"2026-11-28-tp-overlap-{what}tp4"), 1)
    ]
    for model in ("8192-4-steps", "4096-16k"):
        rows += of_whole_model(planner, read(f"2026-11-28-whole-model-tp4-{model}"), 1)
    assert len(rows) == 32 + 24 + 2 * 4
    for name, predicted, measured, _ in rows:
        if abs(predicted / measured - 1) > 0.002:
            raise AssertionError(f"{name}: {predicted:.1f} MiB, measured {measured:.1f}")


def refusals() -> None:
    """By name: what is not here."""
    Planner()
    import transformer_engine as te

    recipe = te.common.recipe
    for ask, flag in (
        (recipe.MXFP8BlockScaling, "--fp8-recipe"),
        (lambda: recipe.Float8CurrentScaling(fp8_dpa=True), "--fp8-dot-product-attention"),
        (lambda: te.pytorch.fp8_model_init(enabled=True), "--fp8-param-gather"),
        (te.pytorch.ops.Sequential, "--use-transformer-engine-op-fuser"),
        (lambda: te.pytorch.ops.Sequential(*(te.pytorch.RMSNorm(8, device="cpu") for _ in range(2))), "op-fuser"),
    ):
        try:
            ask()
        except NotImplementedError as error:
            assert flag in str(error)
        else:
            raise AssertionError(f"{flag} is not refused")


def backends_of_attention() -> None:
    """cuDNN's where the choice is free, as on Hopper. Causal products count as half, and make no memory."""
    planner = Planner()
    import torch
    from transformer_engine.pytorch import DotProductAttention

    tracker, heads, width = planner.tracker, 4, HIDDEN // 4
    shape = TOKENS // 2, 2, heads, width
    product, whole, sums = TOKENS * heads * width * shape[0], mib(TOKENS * HIDDEN), mib(2 * TOKENS * heads)
    for fused, kept in (("1", whole + sums), ("0", 5 * whole + sums)):  # flash has inputs and output in its own layout
        os.environ["NVTE_FUSED_ATTN"] = fused
        with planner.simulation():
            inputs = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
            before = tracker.bytes
            planner.clock.clear()
            output = DotProductAttention(heads, width)(*inputs, attn_mask_type="causal")
            near(f"fused {fused}, kept", (tracker.bytes - before) / MIB, kept)
            output.backward(torch.zeros_like(output))
            if planner.clock.flops != 7 * product:
                raise AssertionError(f"{planner.clock.flops}, expected 7 products of {product}")
            planner.clock.clear()
            DotProductAttention(heads, width, window_size=(0, 0))(*inputs, attn_mask_type="causal")
            if not planner.clock.flops < 0.01 * product:
                raise AssertionError(f"{planner.clock.flops} of a window of one key")
            del inputs, output


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        linear_layers_under_sequence_parallelism,
        layers_in_fp8,
        measured_peaks,
        measured_peaks_under_tensor_parallelism,
        refusals,
        backends_of_attention,
    )
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()

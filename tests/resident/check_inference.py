"""Megatron's inference engines generate with a tiled model what they generate with a dense one, under ``install()``.

    torchrun --standalone --nproc-per-node 1 -m tests.resident.check_inference static       (or dynamic)

The static engine runs on a CPU too; the dynamic one needs a GPU and flash attention (2, 3 or 4).
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.harness import leave

VOCABULARY, LENGTH, BLOCK = 128, 512, 256
PROMPTS = [[5, 9, 2, 77, 31], [64, 3], [8, 8, 8, 100, 1, 2, 3, 4]]
#: Logits are about 10 at most: in bf16, of which a neighbour is then 0.06 away, a token may win by rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}


def build(tiled: bool, dtype: torch.dtype) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_tiling import TilingConfig, tile

    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(11, inference_rng_tracker=True, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        inference_rng_tracker=True,
        init_method_std=0.2,  # few tokens are likely
        persist_layer_norm=False,
        masked_softmax_fusion=False,
    )
    model: Any = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, parallel_output=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if tiled:
        reports = tile(model, TilingConfig(factor=4, modules="all"))
        assert all(report.grid is not None for report in reports)
    return model.cuda().eval()


def controller_of(model: Any, context: Any) -> Any:
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    tokenizer = SimpleNamespace(
        vocab_size=VOCABULARY,
        eod=VOCABULARY - 1,
        bos=0,
        tokenize=lambda text: [int(token) for token in text.split()],
        detokenize=lambda tokens, **options: " ".join(map(str, tokens)),
        offsets=lambda tokens, text: list(range(len(tokens))),
    )
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.model_is_pipeline_parallel = False
    return TextGenerationController(wrapper, tokenizer)


def sampling() -> Any:
    from megatron.core.inference.sampling_params import SamplingParams

    return SamplingParams(num_tokens_to_generate=12, termination_id=-1, top_k=1, return_log_probs=True)


def generated(request: Any) -> tuple[list[int], list[float]]:
    return list(map(int, request.generated_tokens)), list(map(float, request.generated_log_probs))


def static(model: Any) -> list[tuple[list[int], list[float]]]:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine

    context = StaticInferenceContext(len(PROMPTS), 64)
    engine = StaticInferenceEngine(controller_of(model, context), max_batch_size=len(PROMPTS), legacy=True)
    requests = engine.generate([" ".join(map(str, prompt)) for prompt in PROMPTS], sampling_params=sampling())
    return [generated(request) for request in requests]


def dynamic(model: Any) -> list[tuple[list[int], list[float]]]:
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine
    from megatron.core.inference.inference_request import DynamicInferenceRequest

    settings = InferenceConfig(
        max_sequence_length=LENGTH,
        buffer_size_gb=0.5,
        block_size_tokens=BLOCK,
        materialize_only_last_token_logits=False,
        unified_memory_level=0,
        max_requests=16,
        sampling_backend="torch",
    )
    context = DynamicInferenceContext(model_config=model.config, inference_config=settings)
    engine = DynamicInferenceEngine(controller_of(model, context), context)
    for index, prompt in enumerate(PROMPTS):
        tokens = torch.tensor(prompt, device="cuda")
        options = {"sampling_params": sampling(), "block_size_tokens": BLOCK}
        engine._add_request(DynamicInferenceRequest(request_id=index, prompt_tokens=tokens, **options))
    finished = {}
    while engine.has_unfinished_requests():
        for record in engine.step_modern()["finished_request_records"]:
            request = record.merge()
            finished[request.request_id] = generated(request)
    return [finished[index] for index in range(len(PROMPTS))]


def main() -> None:
    import megatron_tiling
    from megatron_tiling import cpu

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.install(train=False)
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    megatron_tiling.install()
    from megatron.core import parallel_state

    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    run = {"static": static, "dynamic": dynamic}[sys.argv[1]]
    with torch.inference_mode():
        dense, tiled = (run(build(is_tiled, dtype)) for is_tiled in (False, True))
    for prompt, (tokens, log_probs), (tiled_tokens, tiled_log_probs) in zip(PROMPTS, dense, tiled, strict=True):
        assert len(tokens) == len(log_probs) == 12 and len(set(tokens)) > 1, (tokens, log_probs)
        pairs = zip(tokens, tiled_tokens, strict=True)
        same = next((index for index, (token, other) in enumerate(pairs) if token != other), len(tokens))
        assert same == len(tokens) or dtype == torch.bfloat16, f"{prompt}: {tokens} dense, {tiled_tokens} tiled"
        # Where both take another token for the first time, these are equally likely; what follows has another prompt.
        compared = list(zip(log_probs, tiled_log_probs, strict=True))[: same + 1]
        difference = max(abs(dense - tiled) for dense, tiled in compared)
        assert difference <= TOLERANCE[dtype], f"{prompt}: log-probabilities differ by {difference}"
        print(f"{prompt} -> {tokens}, the first {same} the same, log-probabilities within {difference:.1e}")
    print(f"the {sys.argv[1]} engine generates the same, dense and tiled, in {dtype}")
    leave()


if __name__ == "__main__":
    main()

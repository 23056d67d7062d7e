"""The training that the checks of ZeRO-3 share: a small GPT, dense and in DeepSpeed's engine, on the same batches."""

from collections.abc import Iterator
from typing import Any

import torch

ITERATIONS, TENSOR_PARALLEL, FACTOR = 20, 2, 4
SEQUENCE, BATCH, WORDS = 24, 2, 128
ENGINE = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 3},
    "steps_per_print": 1000000,
}


def transformer(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        ffn_hidden_size=options.pop("ffn_hidden_size", 40),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=TENSOR_PARALLEL,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **options,
    )


def gpt(config: Any) -> torch.nn.Module:
    """A GPT whose weights depend on nothing but the seed."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(11)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    with torch.device(device()):  # zero.Init builds there: torch's own modules must draw from the same generator
        return GPTModel(config, spec, WORDS, SEQUENCE, share_embeddings_and_output_weights=False)


def micro_batches(iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of this data-parallel rank."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    generator = torch.Generator().manual_seed(iteration)
    steps = ENGINE["gradient_accumulation_steps"]
    text = torch.randint(0, WORDS, (steps, ranks, BATCH, SEQUENCE + 1), generator=generator)
    for part in text[:, rank]:
        yield part[:, :-1], part[:, 1:]


def device() -> str:
    """The benchmark runs this training on GPUs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def loss_of(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(SEQUENCE, device=device()).expand(BATCH, SEQUENCE)
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device()), 1)
    loss: torch.Tensor = model(tokens.to(device()), positions, mask, labels=labels.to(device())).mean()
    return loss


def averaged(losses: list[torch.Tensor]) -> float:
    from megatron.core import parallel_state

    loss = torch.stack([loss.detach() for loss in losses]).mean()
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return float(loss / parallel_state.get_data_parallel_world_size())


def train_dense(config: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the model that no one partitions; gradients are reduced as Megatron does."""
    from megatron.core import parallel_state

    from megatron_tiling.zero3 import engine as zero3

    model, losses, norms = gpt(config).to(device()), [], []
    optimizer = torch.optim.AdamW(zero3.parameter_groups(model), lr=4e-3)
    tensor_group, data_group = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    )
    for iteration in range(ITERATIONS):
        batch = []
        for tokens, labels in micro_batches(iteration):
            batch.append(loss_of(model, tokens, labels))
            (batch[-1] / ENGINE["gradient_accumulation_steps"]).backward()
        squares = torch.zeros((), device=device())
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            shared = "q_layernorm" in name or "k_layernorm" in name
            if shared or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False)):
                torch.distributed.all_reduce(grad, group=tensor_group)
            torch.distributed.all_reduce(grad, group=data_group)
            grad /= data_group.size()
            if getattr(parameter, "tensor_model_parallel", False) or tensor_group.rank() == 0:
                squares += grad.square().sum()
        torch.distributed.all_reduce(squares, group=tensor_group)
        norms.append(float(squares.sqrt()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, ENGINE["gradient_clipping"] / (norms[-1] + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(averaged(batch))
    return losses, norms


def engine_of(
    config: Any, tiled: bool, thresholds: dict[str, Any], frozen: str = "nothing", factor: int = FACTOR
) -> Any:
    """The engine; weights with ``frozen`` in their names are not trained."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.zero3 import engine as zero3

    def build() -> torch.nn.Module:
        model = gpt(config)
        if tiled:
            tile(model, TilingConfig(factor=factor, storage="partitioned"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        return model

    settings = ENGINE | {"zero_optimization": {"stage": 3, **thresholds}}
    model = zero3.build(build, config, settings)
    return zero3.initialize(model, lambda groups: torch.optim.AdamW(groups, lr=4e-3), settings)


def train_zero3(engine: Any, iterations: int = ITERATIONS) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for iteration in range(iterations):
        batch = []
        for tokens, labels in micro_batches(iteration):
            batch.append(loss_of(engine, tokens, labels))
            engine.backward(batch[-1])
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        losses.append(averaged(batch))
    return losses, norms


def close(actual: list[float], expected: list[float], tolerance: float) -> bool:
    return len(actual) == len(expected) and all(
        abs(a - e) <= tolerance * abs(e) for a, e in zip(actual, expected, strict=True)
    )

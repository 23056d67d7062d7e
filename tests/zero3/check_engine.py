"""ZeRO-3 with tensor parallelism on real process groups over gloo, against a dense model and dense ZeRO-3.

    torchrun --standalone --nproc-per-node 4 -m tests.zero3.check_engine

Prints one line a check; the exit code is not 0 if one fails.
"""

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tests.support.harness import Counter, megatron

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


def engine_of(config: Any, tiled: bool, thresholds: dict[str, Any], frozen: str = "nothing") -> Any:
    """The engine; weights with ``frozen`` in their names are not trained."""
    from megatron_tiling import TilingConfig, tile
    from megatron_tiling.zero3 import engine as zero3

    def build() -> torch.nn.Module:
        model = gpt(config)
        if tiled:
            tile(model, TilingConfig(factor=FACTOR, storage="partitioned"))
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


@contextlib.contextmanager
def watching(engine: Any) -> Iterator[dict[str, int]]:
    """The most elements alive at any moment, of linear weights and of all else that is gathered.

    Looked at after each change: every gather starts and every release ends in one of these methods.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    from megatron_tiling.zero3.gather import TileGathering

    linear = {
        id(parameter)
        for name, parameter in engine.module.named_parameters()
        if any(part in name for part in ("linear_", "mlp.tiles", "output_layer"))
    }
    parameters = list(engine.module.parameters())
    most = {"linear": 0, "rest": 0}
    methods = [
        (Coordinator, "_PartitionedParameterCoordinator__all_gather_params_"),
        (Coordinator, "_PartitionedParameterCoordinator__release_param"),
        (TileGathering, "_acquire"),
        (TileGathering, "_release"),
    ]
    stock = [getattr(*method) for method in methods]

    def look(owner: Any) -> None:
        alive = {"linear": 0, "rest": 0}
        ahead = {id(gather.parameter) for gather in (getattr(owner, "_ahead", None) or (None, []))[1]}
        for parameter in parameters:
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE or id(parameter) in ahead:
                is_weight = id(parameter) in linear and len(parameter.ds_shape) > 1
                alive["linear" if is_weight else "rest"] += parameter.ds_numel
        for kind in most:
            most[kind] = max(most[kind], alive[kind])

    def watched(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            look(args[0])
            return result

        return call

    for (owner, name), method in zip(methods, stock, strict=True):
        setattr(owner, name, watched(method))
    try:
        yield most
    finally:
        for (owner, name), method in zip(methods, stock, strict=True):
            setattr(owner, name, method)


def close(actual: list[float], expected: list[float], tolerance: float) -> bool:
    return len(actual) == len(expected) and all(
        abs(a - e) <= tolerance * abs(e) for a, e in zip(actual, expected, strict=True)
    )


def replicated_parameters_agree(engine: Any) -> bool:
    """Parameters that tensor-parallel ranks share are still the same on all of them."""
    import deepspeed
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    agree = True
    for parameter in engine.module.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            with deepspeed.zero.GatheredParameters(parameter):
                copies = [torch.empty_like(parameter) for _ in range(group.size())]
                torch.distributed.all_gather(copies, parameter.detach().contiguous(), group=group)
                agree &= all(torch.equal(copies[0], copy) for copy in copies)
    return agree


def check_training(report: Any) -> None:
    """A Llama-like model, with all that makes gradients differ between tensor-parallel ranks."""
    from megatron_tiling.zero3 import engine as zero3

    def config() -> Any:
        return transformer(
            sequence_parallel=True,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            qk_layernorm=True,
        )

    losses, norms = train_dense(config())
    engine = engine_of(config(), tiled=True, thresholds={})
    sizes = zero3.tile_sizes(engine.module)
    assert sizes is not None
    with watching(engine) as most:
        tiled_losses, tiled_norms = train_zero3(engine)
    report("losses as dense", close(tiled_losses, losses, 2e-5), (tiled_losses, losses))
    report("gradient norms as dense", close(tiled_norms, norms, 1e-4), (tiled_norms, norms))
    report("two tiles alive at most", 0 < most["linear"] <= 2 * sizes.largest, (most, sizes))
    report("shared parameters stay equal", replicated_parameters_agree(engine))
    dense = engine_of(config(), tiled=False, thresholds=thresholds_of(engine))
    with watching(dense) as most_dense:
        train_zero3(dense, 3)
    whole = max(zero3.whole_size(parameter) for parameter in dense.module.decoder.parameters())
    report("dense ZeRO-3 holds a layer", most_dense["linear"] >= whole > 2 * sizes.largest, (most_dense, whole))


def check_gathering(report: Any) -> None:
    """Our hooks fetch ahead and leave nothing behind, also for frozen tiles, recomputed layers and evaluation."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from megatron_tiling.partitioned.modules import MLPTile, WeightTile
    from megatron_tiling.zero3.gather import TileGathering

    def config() -> Any:
        return transformer(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)

    def losses_of(engine: Any) -> list[float]:
        losses, _ = train_zero3(engine, 2)
        with torch.no_grad():
            losses.append(averaged([loss_of(engine, *next(micro_batches(0)))]))
        return losses + train_zero3(engine, 2)[0]

    def has_hooks_of_deepspeed(engine: Any) -> bool:
        tiles = [module for module in engine.module.modules() if isinstance(module, (WeightTile, MLPTile))]
        return any(hook.__module__.startswith("deepspeed.") for tile in tiles for hook in tile._forward_hooks.values())

    found: list[bool] = []
    stock = TileGathering._take_ahead

    def counting(self: Any, tile: Any) -> Any:
        gathers = stock(self, tile)
        if tile is not None:
            found.append(gathers is not None)
        return gathers

    TileGathering._take_ahead = counting
    ours = engine_of(config(), tiled=True, thresholds={}, frozen="linear_qkv")
    losses = losses_of(ours)
    TileGathering._take_ahead = stock
    # In the first step each tile is waited for: forward, recomputed and backward. Later only the first one of the
    # forward pass, of the head's backward pass, and of each layer's recomputation and backward pass.
    tiles = [name for name, module in ours.module.named_modules() if isinstance(module, (WeightTile, MLPTile))]
    in_layers = sum(name.startswith("decoder.") for name in tiles)
    waits = 2 * len(tiles) + in_layers + 1 + 3 * (2 + 2 * config().num_layers)
    calls = 4 * (2 * len(tiles) + in_layers) + len(tiles)
    counted = found.count(False), len(found)
    report("tiles are fetched ahead", counted == (waits, calls), (counted, waits, calls))
    left = [name for name, one in ours.module.named_parameters() if one.ds_status != ZeroParamStatus.NOT_AVAILABLE]
    report("nothing is left gathered", not [name for name in left if ".tiles." in name], left)
    theirs = engine_of(config(), True, {"stage3_use_all_reduce_for_fetch_params": True}, frozen="linear_qkv")
    report("who gathers", (has_hooks_of_deepspeed(ours), has_hooks_of_deepspeed(theirs)) == (False, True))
    expected = losses_of(theirs)
    report("as with DeepSpeed's hooks", close(losses, expected, 1e-6), (losses, expected))


def thresholds_of(engine: Any) -> dict[str, Any]:
    zero = engine._config.zero_config
    return {
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
    }


def check_warnings(report: Any) -> None:
    """DeepSpeed's defaults keep everything resident: each such setting is named."""
    defaults = {
        "stage3_max_live_parameters": int(1e9),
        "stage3_max_reuse_distance": int(1e9),
        "stage3_prefetch_bucket_size": int(5e7),
        "stage3_param_persistence_threshold": int(1e5),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine_of(transformer(), tiled=True, thresholds=defaults)
    warned = [line for line in printed.getvalue().splitlines() if "megatron_tiling: WARNING" in line]
    if torch.distributed.get_rank() == 0:
        for name in ("persistence_threshold", "reuse_distance", "prefetch_bucket_size"):
            report(f"warning names {name}", sum(f"stage3_{name}" in line or f"{name} " in line for line in warned) >= 1)
    else:
        report("only rank 0 warns", not warned)


def check_agreement(report: Any) -> None:
    from megatron_tiling.zero3.agreement import require_agreement

    rank = torch.distributed.get_rank()
    try:
        require_agreement({"--tile-factor": 8 if rank == 3 else 4, "--use-tiled-linear": True})
        message = ""
    except ValueError as error:
        message = str(error)
    wanted = "--tile-factor: every rank must have the same value; most have 4, rank 3 has 8"
    report("another rank's tile factor", message == wanted, message)
    require_agreement({"--tile-factor": 4})


def refusal(config: Any, **zero: Any) -> str:
    """What `build` has against this offload."""
    from megatron_tiling.zero3 import engine as zero3

    try:
        zero3.build(lambda: gpt(config), config, ENGINE | {"zero_optimization": {"stage": 3, **zero}})
    except ValueError as error:
        return str(error)
    return ""


def check_offload(report: Any) -> None:
    """An offload larger than the host, or to a disk without the library for it, ends before it begins."""
    from megatron_tiling.zero3 import engine as zero3

    config = transformer()
    parameters = sum(-(-parameter.numel() // 2) for parameter in gpt(config).parameters())
    with mock.patch.object(zero3, "available_host_memory", lambda: 1000):
        message = refusal(config, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    words = [f"({parameters * 4} bytes)", f"({parameters * 16} bytes)", "(1000 bytes) are available", "offload_param"]
    report("host memory is too small", all(word in message for word in words), message)
    with mock.patch.object(
        zero3.import_deepspeed().ops.op_builder.AsyncIOBuilder, "is_compatible", lambda *_, **__: False
    ):
        message = refusal(config, offload_param={"device": "nvme", "nvme_path": "/disk"})
    report("no libaio", "offload to nvme" in message and "libaio-dev" in message, message)


def check_collectives(report: Any) -> None:
    """All-reduces of one MLP's forward pass: ours one, tile by tile around Megatron's layers sixteen."""
    from benchmarks import zero3_collectives

    counts = zero3_collectives.count(Counter, transformer(ffn_hidden_size=80), factor=2)
    report("all-reduces of an MLP", (counts["ours"], counts["DeepSpeed's TiledLinear"]) == (1, 16), counts)


def main() -> None:
    failed = itertools.count()

    def report(name: str, passed: bool, detail: Any = "") -> None:
        if not passed:
            next(failed)
        if not passed or torch.distributed.get_rank() == 0:
            print(f"ok: {name}" if passed else f"FAILED: {name} {detail}", flush=True)

    with megatron(tensor_model_parallel_size=TENSOR_PARALLEL):
        for check in (
            check_agreement,
            check_offload,
            check_collectives,
            check_warnings,
            check_gathering,
            check_training,
        ):
            check(report)
    sys.exit(next(failed) > 0)


if __name__ == "__main__":
    main()

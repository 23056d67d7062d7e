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

from tests.support.harness import Counter, load_deepspeed, megatron
from tests.zero3.check_checkpoint_check import check_resuming
from tests.zero3.check_gather import check_gathering, check_submodules
from tests.zero3.small_gpt import ENGINE, TENSOR_PARALLEL, close, engine_of, gpt, train_dense, train_zero3, transformer


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
        ahead = getattr(owner, "_ahead", {})
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
    printed_lines = printed.getvalue().splitlines()
    warned = [line for line in printed_lines if "megatron_tiling: WARNING" in line]
    if torch.distributed.get_rank() == 0:
        for name in ("persistence_threshold", "reuse_distance", "prefetch_bucket_size"):
            report(f"warning names {name}", sum(f"stage3_{name}" in line or f"{name} " in line for line in warned) >= 1)
        said = [line for line in printed_lines if "DeepSpeed's own hooks gather the tiles: see above" in line]
        report("who gathers is said", len(said) == 1, printed_lines)
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
    from megatron_tiling.zero3 import host_memory

    config = transformer()
    parameters = sum(-(-parameter.numel() // 2) for parameter in gpt(config).parameters())
    with mock.patch.object(host_memory, "available_host_memory", lambda: 1000):
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

    load_deepspeed()
    with megatron(tensor_model_parallel_size=TENSOR_PARALLEL):
        for check in (
            check_agreement,
            check_offload,
            check_collectives,
            check_warnings,
            check_gathering,
            check_submodules,
            check_resuming,
            check_training,
        ):
            check(report)
    sys.exit(next(failed) > 0)


if __name__ == "__main__":
    main()

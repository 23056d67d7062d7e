"""What the tracker sees of real tensors and of fake ones: a line of JSON for each of some models.

    python -m tests.plan.check_fake
    torchrun --standalone --nproc-per-node 2 -m tests.plan.check_fake

Two ranks of tensor parallelism, of which only the first exists, or both, over gloo; in the form of a CPU. Alone, each
model is run on fake and on real tensors. Threads of gloo hold a tensor longer than its collective takes, now and then.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tiling import cpu
from megatron_tiling.config import TilingConfig
from megatron_tiling.plan import gpu, run
from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.process_groups import fake_process_groups
from megatron_tiling.plan.tracker import Tracker
from tests.support.harness import leave

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FROZEN: dict[str, Any] = {"frozen": ("embedding", "decoder.layers.0")}
#: Changes of Megatron's config, and of the tiling, if any.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "dense": ({}, None),
    "dense, sequence parallel": ({"sequence_parallel": True}, None),
    "dense, recompute": (RECOMPUTE, None),
    "dense, recompute attention": ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, None),
    "dense, fp16": ({"bf16": False, "fp16": True, "params_dtype": torch.float16}, None),
    "dense, next-token heads": ({"mtp_num_layers": 2}, None),
    "tiled, next-token heads": ({"mtp_num_layers": 1}, {"mlp_keep": 1}),
    "dense, frozen below": (FROZEN, None),
    "tiled, frozen below": (FROZEN, {"mlp_keep": 1}),
    "tiled": ({}, {}),
    "tiled, sequence parallel": ({"sequence_parallel": True}, {"modules": "all"}),
    "tiled, keep 0": ({}, {"mlp_keep": 0, "head_tokens": 16, "head_keep": 0}),
    "tiled, recompute": (RECOMPUTE, {"mlp_keep": 1}),
}
SEQUENCE, BATCH, VOCABULARY = 64, 2, 512


def build(changes: dict[str, Any], tiling: dict[str, Any] | None) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_tiling import tile

    options: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16} | changes
    frozen: tuple[str, ...] = options.pop("frozen", ())
    config = TransformerConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=2, **options,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope", mtp_block_spec=heads,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)
    if tiling is not None:
        tile(model, TilingConfig(**tiling))
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def seen(make: Callable[[], Any], fake: bool) -> dict[str, Any]:
    """Bytes of the model, of the peak of two micro-batches and its parts, and what is left."""
    CLOCK.clear()
    tracker = Tracker(run.module_kinds(), on_operation=CLOCK.operation)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), tracker:
        model = make()
        run.mark_model(tracker, [model])
        found: dict[str, Any] = {"model": tracker.bytes}
        tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
        for _ in range(2):
            loss = model(tokens, tokens, mask, labels=tokens).float().mean()
            loss.backward()
        model.finish_grad_sync()
        found |= {"peak": tracker.peak.bytes, "phase": str(tracker.peak.phase), "parts": tracker.parts()}
        del loss
        found |= {"left": tracker.bytes, "flops": CLOCK.flops}
    return found


def main() -> None:
    alone = "RANK" not in os.environ
    torch.set_num_threads(1)
    cpu.install(train=False)
    if alone:
        fake_process_groups(world=2, rank=0)
    else:
        torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(11)
    gpu.forget_random_states()
    for name, (changes, tiling) in MODELS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        for tensors in ("fake", "real") if alone else ("real",):
            parallel_state.get_global_memory_buffer().buffer.clear()  # which models share
            found = seen(functools.partial(build, changes, tiling), tensors == "fake")
            if torch.distributed.get_rank() == 0:
                print("SEEN", json.dumps([name, tensors, found]), flush=True)
    leave()


if __name__ == "__main__":
    main()

"""A GPT of TransformerEngine's layers as a stock user builds it, and many of them on one set of parameters."""

import argparse
import datetime
import logging
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arguments import at_least, positive

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "flash-attn-4")
#: How tokens choose experts, for pages.
ROUTING = "tokens choose them by a router of random weights, which nothing balances"
#: After which a rank no longer waits for one that is stuck.
TIMEOUT_MINUTES = 3


def add_shape(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Flags of a model's shape; heads are 128 wide."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default)
    parser.add_argument(
        "--experts", type=at_least(0), default=0, help="in every layer, in grouped GEMMs, in place of its MLP"
    )
    parser.add_argument("--heads", type=positive, help="of attention; by default they fill the hidden size")
    parser.add_argument("--top-k", type=positive, default=8, help="experts that a token goes to")
    parser.add_argument("--moe-ffn-hidden-size", type=positive, default=768, help="of an expert")
    parser.add_argument("--tied", action="store_true", help="one weight for the embedding and the output layer")
    parser.add_argument("--attention", default="auto", choices=("auto", "fused", "flash", "unfused"))


def initialize(expert_parallel: int = 1, tensor_parallel: int = 1) -> None:
    """A world of one process, as Megatron wants it, without its warnings.

    Args:
        expert_parallel, tensor_parallel: processes under torchrun that divide the experts, or all layers, if there
            are more than one.
    """
    if tensor_parallel > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron asks for, before the first use of CUDA
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    torch.backends.cudnn.version()  # fails where another cuDNN is found first: here, not after measuring
    if expert_parallel > 1 or tensor_parallel > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl", timeout=datetime.timedelta(minutes=TIMEOUT_MINUTES))
    else:
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        distributed_timeout_minutes=TIMEOUT_MINUTES,
    )
    torch.manual_seed(1)


def build(args: argparse.Namespace, changes: dict[str, Any], head: bool = True) -> Any:
    """A model of the shape of ``args``, with ``changes`` of Megatron's config.

    Args:
        head: it has an output layer, for which apex's kernel must be built, and a loss.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    for variable in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):  # Megatron sets them once a process
        os.environ.pop(variable, None)
    model_parallel_cuda_manual_seed(11)
    experts: dict[str, Any] = {}
    if args.experts:
        experts = {"num_moe_experts": args.experts, "moe_router_topk": args.top_k, "moe_grouped_gemm": True}
        experts |= {"moe_ffn_hidden_size": args.moe_ffn_hidden_size, "moe_permute_fusion": True}
        experts |= {"moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none"}
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.heads or args.hidden_size // 128,
        kv_channels=128,
        num_query_groups=args.query_groups,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=True,
        cross_entropy_loss_fusion=True,
        attention_backend=AttnBackend[args.attention],
        **experts | changes,
    )
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, config.moe_grouped_gemm),
        vocab_size=args.vocabulary,
        max_sequence_length=args.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=args.tied,
        post_process=head,
    ).cuda()
    if torch.cuda.is_available():  # else the planner builds it
        check_attention(model.decoder.layers[0].self_attention)
    return model


def check_attention(attention: Any, device: str = "cuda") -> None:
    """Compare the kernels of a Megatron attention with torch's.

    Raises:
        SystemExit: they compute something else. Of TransformerEngine 2.17.1 and flash-attn-4 4.0.0b36 it is nothing.
    """
    from megatron.core.transformer.enums import AttnMaskType

    groups = attention.num_query_groups_per_partition
    heads = attention.num_attention_heads_per_partition, groups, groups
    parts = [torch.randn(256, 2, count, 128, device=device, dtype=torch.bfloat16) for count in heads]
    with torch.no_grad():
        found = attention.core_attention(*parts, None, attn_mask_type=AttnMaskType.causal).float()
    batched = [part.permute(1, 2, 0, 3).float() for part in parts]
    right = F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    error = float((found - right).norm() / right.norm())
    if not error < 0.05:
        raise SystemExit(f"these attention kernels are {error:.2f} off from torch's; choose others by --attention")


def with_main_grad(model: Any) -> Any:
    """Megatron's DDP around a model, which holds its gradients in float32."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def share(model: Any, parameters: dict[str, Tensor]) -> None:
    """Let a model run on other parameters."""
    for name, parameter in parameters.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, parameter)


def batch(args: argparse.Namespace, sequence: int, count: int = 1) -> dict[str, Tensor | None]:
    """Random tokens, as ``GPTModel.forward`` takes them by name."""
    tokens = torch.randint(0, args.vocabulary, (count, sequence), device="cuda")
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(sequence, device="cuda").expand(count, -1),
        "attention_mask": None,
        "labels": tokens.roll(-1, 1),
    }

"""Ways to compute the LM head's loss: Megatron's, TransformerEngine's, Liger's, Apple's, and this package's.

All share one weight, whose float32 ``main_grad`` is held all the time, as Megatron's DDP holds it: Megatron's way and
ours add to it in their wgrad GEMMs, the others have it added by a hook.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.mlp_candidates import Candidate
from megatron_tiling.resident.lm_head import TiledOutputLayer
from megatron_tiling.tiles.gemm import gemm_into
from megatron_tiling.tiles.head import tiled_linear_cross_entropy
from megatron_tiling.tiles.head_cut import HeadCut, HeadSizes, HeadTiles

DENSE, FUSED, LIMIT = "Megatron-core", "Megatron-core, fused loss", "four GEMMs, nothing else"


def initialize() -> int:
    """Process groups for the tensor-parallel size that torchrun says, or one process; returns the size."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.HashStore() if size == 1 else None, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    random.seed(1234)  # every process runs the candidates in the same order
    torch.manual_seed(1234)
    return size


def output_layer(hidden_size: int, vocabulary: int, sequence_parallel: bool = False) -> ColumnParallelLinear:
    """A stock output layer whose ``main_grad`` is there."""
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, num_attention_heads=32, params_dtype=torch.bfloat16, bf16=True,
        gradient_accumulation_fusion=has_wgrad_kernel(), sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=dist.get_world_size(),
    )  # fmt: skip
    layer = ColumnParallelLinear(
        hidden_size, vocabulary, config=config, init_method=config.init_method, bias=False, gather_output=False
    )
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)

    def add(parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

    layer.weight.register_post_accumulate_grad_hook(add)
    return layer


def has_wgrad_kernel() -> bool:
    """Whether apex's kernel, with which Megatron fuses the accumulation of weight gradients, is there."""
    from importlib.util import find_spec

    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def of_megatron(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    def losses(hidden: Tensor, labels: Tensor = labels) -> Tensor:
        return vocab_parallel_cross_entropy(dense(hidden)[0], labels, tp_group=dense.tp_group)

    def chunks(hidden: Tensor) -> Tensor:
        parts = zip(hidden.chunk(16), labels.chunk(16), strict=True)
        return torch.cat([tensor_parallel.checkpoint(losses, False, *part) for part in parts])

    named = {DENSE: losses}
    if dist.get_world_size() == 1:
        named[f"{DENSE}, 16 token chunks, checkpoint"] = chunks
    return [of_megatron_fused(dense, labels), *(Candidate(name, run, [dense.weight]) for name, run in named.items())]


def of_megatron_fused(dense: ColumnParallelLinear, labels: Tensor) -> Candidate:
    def fused(hidden: Tensor) -> Tensor:
        return fused_vocab_parallel_cross_entropy(dense(hidden)[0], labels, dense.tp_group)

    return Candidate(FUSED, fused, [dense.weight])


def of_transformer_engine(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def losses(hidden: Tensor) -> Tensor:  # as Megatron calls it
        return parallel_cross_entropy(dense(hidden)[0], labels, 0.0, False, dense.tp_group, -100, False)

    return [Candidate("TransformerEngine's fused loss", losses, [dense.weight])]


class FixedCut(HeadTiles):
    """Tiles of one cut, whatever there is to be cut."""

    def __init__(self, cut: HeadCut) -> None:
        super().__init__()
        object.__setattr__(self, "fixed", cut)

    def cut(self, sizes: HeadSizes) -> HeadCut:
        fixed: HeadCut = vars(self)["fixed"]
        return fixed


def of_ours(dense: ColumnParallelLinear, labels: Tensor, named: dict[str, HeadTiles]) -> list[Candidate]:
    """One for each name and its tiles."""
    layer = output_layer(dense.input_size, dense.output_size, dense.sequence_parallel)
    layer.weight = dense.weight
    layer.__class__ = TiledOutputLayer
    layer.set_tiles(1, 1)
    layer.gradient_accumulation_fusion = True
    candidates = []
    for name, tiles in named.items():

        def losses(hidden: Tensor, tiles: HeadTiles = tiles) -> Tensor:
            layer.head_tiles = tiles
            return tiled_linear_cross_entropy(hidden, layer.weight, labels, layer.loss_loop()).loss

        candidates.append(Candidate(name, losses, [dense.weight], (layer,)))
    return candidates


def of_liger(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def mean_loss(hidden: Tensor) -> Tensor:
        return loss(dense.weight, hidden.flatten(0, 1), labels.flatten())

    return [Candidate("Liger fused linear cross entropy", spread_over(labels, mean_loss), [dense.weight])]


def of_cut_cross_entropy(dense: ColumnParallelLinear, labels: Tensor) -> list[Candidate]:
    from cut_cross_entropy import linear_cross_entropy

    candidates = []
    for impl in ("cce", "torch_compile"):

        def mean_loss(hidden: Tensor, impl: str = impl) -> Tensor:
            return linear_cross_entropy(hidden.flatten(0, 1), dense.weight, labels.flatten(), impl=impl)

        candidates.append(Candidate(f"cut-cross-entropy {impl}", spread_over(labels, mean_loss), [dense.weight]))
    return candidates


def spread_over(labels: Tensor, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A mean loss, which peers compute, in the place of each token's; with equal upstream gradients the same."""
    return lambda hidden: run(hidden).float().expand(labels.shape)


class FourGemms(torch.autograd.Function):
    """The products of a head that makes its logits twice, at their full size, and no softmax."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.main_grad = weight.main_grad
        return (hidden.flatten(0, 1) @ weight.t())[:, :1].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        hidden, weight = ctx.saved_tensors
        logits = hidden.flatten(0, 1) @ weight.t()
        gemm_into(ctx.main_grad, logits.t(), hidden.flatten(0, 1), accumulate=True)
        return (logits @ weight).view_as(hidden), None


def of_four_gemms(dense: ColumnParallelLinear) -> Candidate:
    return Candidate(LIMIT, lambda hidden: FourGemms.apply(hidden, dense.weight), [dense.weight])

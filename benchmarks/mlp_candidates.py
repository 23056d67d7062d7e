"""What is compared: one SwiGLU MLP, forward and backward, in Megatron's, DeepSpeed's, Liger's and this package's ways.

All Megatron-based candidates share the same weights. A candidate is a function of the hidden states ``[s, 1, h]``
that returns the output; peers whose layout is another view of the same tokens are given that view.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tiling.resident.layers import TiledColumnParallelLinear, TiledRowParallelLinear
from megatron_tiling.resident.mlp import convert_mlp

SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


@dataclass(frozen=True)
class Candidate:
    """``run(hidden) -> output``; ``parameters`` get gradients; ``layers`` are those of ours, which can fuse them."""

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: list[torch.nn.Parameter]
    layers: tuple[torch.nn.Module, ...] = ()


def initialize() -> None:
    """A world of one process, as Megatron wants it."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def megatron_mlp(hidden_size: int, ffn_hidden_size: int) -> MLP:
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, num_attention_heads=32,
        params_dtype=torch.bfloat16, bf16=True, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, bias_activation_fusion=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    return MLP(config, SUBMODULES, ffn_hidden_size=ffn_hidden_size)


def tiled_layers(dense: MLP, tiles: int, fp32_accumulate: bool = False) -> MLP:
    """The dense MLP's weights in tiled layers."""
    fc1, fc2 = dense.linear_fc1.weight, dense.linear_fc2.weight
    mlp = megatron_mlp(dense.config.hidden_size, dense.config.ffn_hidden_size)
    mlp.linear_fc1.weight, mlp.linear_fc2.weight = fc1, fc2
    mlp.linear_fc1.__class__, mlp.linear_fc2.__class__ = TiledColumnParallelLinear, TiledRowParallelLinear
    mlp.linear_fc1.set_tiles(1, tiles, fp32_accumulate=fp32_accumulate)
    mlp.linear_fc2.set_tiles(tiles, 1, fp32_accumulate=fp32_accumulate)
    return mlp


def of_megatron(dense: MLP) -> list[Candidate]:
    parameters = list(dense.parameters())

    def chunks(hidden: Tensor) -> Tensor:  # as TransformerLayer._forward_mlp with mlp_chunks_for_training
        return torch.cat([dense(chunk)[0] for chunk in hidden.chunk(4, dim=0)], dim=0)

    return [
        Candidate("dense Megatron-core", lambda hidden: dense(hidden)[0], parameters),
        Candidate(
            "Megatron-core, recompute mlp",
            lambda hidden: tensor_parallel.checkpoint(dense, False, hidden)[0],
            parameters,
        ),
        Candidate("Megatron-core, mlp_chunks_for_training=4", chunks, parameters),
    ]


def of_ours(dense: MLP, choices: list[tuple[int, int | None, bool]]) -> list[Candidate]:
    """``choices``: tiles, kept pre-activations (None: all), float32 accumulation."""
    parameters = list(dense.parameters())
    layers = tiled_layers(dense, 8)
    children = tuple(layers.children())
    candidates = [Candidate("ours: tiled layers T=8", lambda hidden: layers(hidden)[0], parameters, children)]
    for tiles, keep, fp32 in choices:
        mlp = tiled_layers(dense, tiles, fp32)
        reason = convert_mlp(mlp, keep)
        assert not reason, reason
        kept = {None: "all", 0: "none"}.get(keep, str(keep))
        name = f"ours: TiledMLP T={tiles} keep {kept}" + (", fp32" if fp32 else "")

        def run(hidden: Tensor, mlp: MLP = mlp) -> Tensor:
            return mlp(hidden)[0]

        candidates.append(Candidate(name, run, parameters, tuple(mlp.children())))
    return candidates


def of_deepspeed(dense: MLP) -> list[Candidate]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP as AlstTiledMLP
    from deepspeed.runtime.zero.tiling import TiledLinear

    fc1, fc2 = dense.linear_fc1.weight, dense.linear_fc2.weight
    candidates = []
    for tiles in (4, 8):
        layers = torch.nn.ModuleList()
        for weight, splits in ((fc1, (1, tiles)), (fc2, (tiles, 1))):
            layer = TiledLinear(
                weight.shape[1], weight.shape[0], bias=False, in_splits=splits[0], out_splits=splits[1],
                device=weight.device, dtype=weight.dtype,
            )  # fmt: skip
            with torch.no_grad():
                for row, out_start in zip(layer.linears, layer.out_parts, strict=False):
                    for tile, in_start in zip(row, layer.in_parts, strict=False):
                        out_size, in_size = tile.weight.shape
                        tile.weight.copy_(weight[out_start : out_start + out_size, in_start : in_start + in_size])
            layers.append(layer)

        def run(hidden: Tensor, layers: torch.nn.ModuleList = layers) -> Tensor:
            return layers[1](bias_swiglu_impl(layers[0](hidden), None))

        candidates.append(Candidate(f"DeepSpeed TiledLinear T={tiles}", run, list(layers.parameters())))

    def alst(hidden: Tensor) -> Tensor:  # it chunks the dimension before the last: [tokens, h]
        tokens = hidden.flatten(0, 1)
        output = AlstTiledMLP.apply(lambda mlp, shard: mlp(shard)[0], dense, tokens, 4, list(dense.parameters()))
        return output.view_as(hidden)

    candidates.append(Candidate("DeepSpeed ALST TiledMLP T=4", alst, list(dense.parameters())))
    return candidates


def of_liger(dense: MLP) -> list[Candidate]:
    from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

    fc1, fc2 = dense.linear_fc1.weight, dense.linear_fc2.weight
    config = SimpleNamespace(hidden_size=fc2.shape[0], intermediate_size=fc2.shape[1], hidden_act="silu")
    candidates = []
    with torch.device(fc1.device):
        mlp = LigerTiledSwiGLUMLP(config).to(fc1.dtype)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(fc1.chunk(2)[0])
        mlp.up_proj.weight.copy_(fc1.chunk(2)[1])
        mlp.down_proj.weight.copy_(fc2)
    for tiles in (4, 8):

        def run(hidden: Tensor, tiles: int = tiles) -> Tensor:
            mlp.num_shards = tiles
            return mlp(hidden.flatten(0, 1)).view_as(hidden)

        candidates.append(Candidate(f"Liger TiledSwiGLU T={tiles}", run, list(mlp.parameters())))
    return candidates

"""Collectives of one MLP's forward pass under tensor parallelism: ours, and DeepSpeed's tiles around Megatron's layers.

DeepSpeed's TiledLinearReturnBias takes a ``linear_cls``, and Megatron-DeepSpeed gives it Megatron's parallel layers,
fc1 as ``f x 4f`` tiles and fc2 as ``4f x f`` for a tile factor of f. Every row-parallel tile then reduces its output.
``benchmarks/zero3.py`` puts the counts into its table, tests/zero3/check_engine.py checks them.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megatron_tiling import TilingConfig, tile
from megatron_tiling.zero3.engine import import_deepspeed


def dense(config: Any) -> MLP:
    return MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))


def ours(config: Any, factor: int) -> MLP:
    """As many tiles as Megatron-DeepSpeed's widest dimension has: 4 x factor."""
    mlp = dense(config)
    tile(mlp, TilingConfig(factor=4 * factor, storage="partitioned"))
    return mlp


def deepspeeds(config: Any, factor: int) -> MLP:
    from deepspeed.runtime.zero.tiling import TiledLinearReturnBias

    def tiled(linear_cls: type, features: tuple[int, int], splits: tuple[int, int], **options: Any) -> torch.nn.Module:
        return TiledLinearReturnBias(
            *features,
            bias=config.add_bias_linear,
            in_splits=splits[0],
            out_splits=splits[1],
            linear_cls=linear_cls,
            config=config,
            init_method=config.init_method,
            skip_bias_add=True,
            **options,
        )

    mlp, ffn = dense(config), config.ffn_hidden_size
    widths = (config.hidden_size, ffn * (2 if config.gated_linear_unit else 1))
    mlp.linear_fc1 = tiled(ColumnParallelLinear, widths, (factor, 4 * factor), gather_output=False)
    mlp.linear_fc2 = tiled(
        RowParallelLinear, (ffn, config.hidden_size), (4 * factor, factor), input_is_parallel=True, is_expert=False
    )
    return mlp


def count(counter: Callable[[], Any], config: Any, factor: int) -> dict[str, int]:
    """All-reduces of each MLP's forward pass.

    Args:
        counter: makes a context that counts the collectives inside (tests/support/harness.py's ``Counter``).
    """
    import_deepspeed()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(8, 2, config.hidden_size, dtype=config.params_dtype, device=device)
    models = {
        "dense": dense(config),
        "DeepSpeed's TiledLinear": deepspeeds(config, factor),
        "ours": ours(config, factor),
    }
    counts = {}
    for name, model in models.items():
        with counter() as counted:
            model(hidden)
        counts[name] = counted.collectives.get("allreduce_", 0)
    return counts

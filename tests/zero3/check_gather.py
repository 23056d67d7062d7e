"""Tiles are fetched ahead, and nothing that was fetched ahead is stale. Called by check_engine."""

import contextlib
from typing import Any

import torch

from tests.zero3.small_gpt import (
    BATCH,
    SEQUENCE,
    averaged,
    close,
    device,
    engine_of,
    gpt,
    loss_of,
    micro_batches,
    train_zero3,
    transformer,
)


def check_gathering(report: Any) -> None:
    """Our hooks fetch ahead and leave nothing behind, also for frozen tiles, recomputed layers and evaluation."""
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

    def counting(self: Any, parameters: Any = ()) -> Any:
        gathers = stock(self, parameters)
        if parameters:
            found.append(bool(gathers))
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
    report("nothing is left gathered", not gathered_tiles(ours), gathered_tiles(ours))
    theirs = engine_of(config(), True, {"stage3_use_all_reduce_for_fetch_params": True}, frozen="linear_qkv")
    report("who gathers", (has_hooks_of_deepspeed(ours), has_hooks_of_deepspeed(theirs)) == (False, True))
    expected = losses_of(theirs)
    report("as with DeepSpeed's hooks", close(losses, expected, 1e-6), (losses, expected))


def gathered_tiles(engine: Any) -> list[str]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = engine.module.named_parameters()
    return [name for name, one in parameters if ".tiles." in name and one.ds_status != ZeroParamStatus.NOT_AVAILABLE]


def check_submodules(report: Any) -> None:
    """A submodule called for itself, and weights that change between calls or within one, give what dense gives."""
    import deepspeed

    dense = gpt(transformer()).to(device())
    engine = engine_of(transformer(), tiled=True, thresholds={})
    layers = engine.module.decoder.layers
    hidden = torch.randn(SEQUENCE, BATCH, 48, generator=torch.Generator().manual_seed(1)).to(device())
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device()), 1)

    def mlp(layer: int, model: Any = engine.module) -> torch.Tensor:
        with torch.no_grad():
            output, bias = model.decoder.layers[layer].mlp(hidden)
            return output + bias

    def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)

    report("an MLP before any forward pass", same(mlp(0), mlp(0, dense)))
    with torch.no_grad():
        own, theirs = (model.decoder.layers[1](hidden, mask)[0] for model in (engine.module, dense))
    report("a layer before any forward pass", same(own, theirs))

    train_zero3(engine, 3)  # from the second on, the next tile is fetched ahead
    mlp(0)
    parameters = list(layers[1].mlp.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        layers[1].mlp.load_state_dict(
            {key: None if value is None else 3 * value for key, value in layers[1].mlp.state_dict().items()}
        )
        expected = mlp(1)  # nothing is fetched here
        intact = all(parameter.numel() for parameter in parameters)
    report("an MLP whose weights have changed", same(mlp(1), expected) and same(mlp(1), expected))
    report("who has gathered keeps what is gathered", intact)

    first = layers[1].self_attention.linear_qkv.tiles.linears[0][0].weight

    def double(*_: Any) -> None:
        with deepspeed.zero.GatheredParameters(first, modifier_rank=0):
            first.data.mul_(2)

    batch = next(micro_batches(0))
    with torch.no_grad():
        loss_of(engine, *batch)
        hook = layers[1].register_forward_pre_hook(double)
        within = averaged([loss_of(engine, *batch)])
        hook.remove()
        after = averaged([loss_of(engine, *batch)])
    report("weights that change within a forward pass", close([within], [after], 1e-6), (within, after))

    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(layers[1].mlp(hidden)[0].sum(), hidden)
    report("gradients of inputs alone leave nothing gathered", grad.any() and not gathered_tiles(engine))

    def fail(*_: Any) -> None:
        raise ArithmeticError

    hook = layers[1].register_forward_pre_hook(fail)
    with contextlib.suppress(ArithmeticError):
        loss_of(engine, *batch)
    hook.remove()
    report("a pass given up halfway leaves nothing on its way", not gathered_tiles(engine))
    report("and the next one is right", close([averaged([loss_of(engine, *batch)])], [after], 1e-6))

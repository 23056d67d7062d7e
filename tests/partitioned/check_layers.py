"""Partitioned layers in whole models, against dense ones: numbers, checkpoints, and what an engine sees of them.

torchrun --standalone --nproc-per-node 4 -m tests.partitioned.check_layers
"""

import collections
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.nn import Parameter

from megatron_tiling import TilingConfig, tile
from megatron_tiling.partitioned.checkpoint import dense_weight
from megatron_tiling.partitioned.layers import (
    PartitionedColumnParallelLinear,
    PartitionedParallelLinear,
    PartitionedRowParallelLinear,
)
from megatron_tiling.partitioned.mlp import PartitionedMLP
from megatron_tiling.partitioned.modules import MLPTile, WeightTile
from megatron_tiling.resident.mlp import TiledMLP
from megatron_tiling.spec import TiledSpecProvider
from tests.check_models import assert_same, batch, expect_error, gpt, make_config
from tests.resident.check_layers import weight_grad, weights
from tests.support.harness import megatron, naming, relative_error

SIZES = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
SWIGLU = {"gated_linear_unit": True, "activation_func": F.silu}
MODELS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu with biases, sequence parallel": SWIGLU | {"sequence_parallel": True},
    "swiglu experts": SWIGLU
    | {"add_bias_linear": False, "sequence_parallel": True, "num_moe_experts": 4}
    | {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather"}
    | {key: value for key, value in SIZES.items() if key.startswith("expert")},
}
#: 3 tiles of 40 // 2 features are uneven.
CONFIG = TilingConfig(factor=3, storage="partitioned")
UNMATCHED = TilingConfig(factor=3, splits={"fc1": (2, 2), "qkv": (2, 3)}, storage="partitioned")


def model(name: str, tiling: TilingConfig | None = None, **options: Any) -> Any:
    changes = MODELS[name] | {"tensor_model_parallel_size": 2}
    config = make_config(**changes)
    experts = {"num_experts": 4, "moe_grouped_gemm": False} if "num_moe_experts" in changes else {}
    built = gpt(
        config,
        **({"spec": get_gpt_layer_local_spec(**experts), "share_embeddings_and_output_weights": False} | options),
    )
    if tiling is not None:
        tile(built, tiling)
    return built


def dense_gradients(built: Any) -> dict[str, Any]:
    """By dense names."""
    grads = {
        name: parameter.grad
        for name, parameter in built.named_parameters()
        if parameter.grad is not None and ".tiles." not in name
    }
    for name, layer in built.named_modules():
        if isinstance(layer, PartitionedParallelLinear) and (grad := weight_grad(layer, None)) is not None:
            grads[f"{name}.weight"] = grad
    return grads


def step(built: Any) -> dict[str, torch.Tensor]:
    loss = built(**batch())
    loss.mean().backward()
    return {"loss": loss.detach()} | dense_gradients(built)


def check_whole_models() -> None:
    """Initial weights bit for bit, losses and gradients to rounding; each tile is called and written to once."""
    for name in MODELS:
        dense = model(name)
        expected, initial = step(dense), dense.state_dict()
        for tiling in (CONFIG, UNMATCHED):
            tiled = model(name, tiling)
            state = tiled.state_dict()
            assert state.keys() == initial.keys()
            for key, value in initial.items():
                assert value is None or torch.equal(value, state[key]), key
            units = [module for module in tiled.modules() if isinstance(module, PartitionedMLP)]
            assert bool(units) == (tiling is CONFIG)
            counts = count_uses(tiled)
            assert_same(step(tiled), expected)
            if units:
                assert set(counts.values()) == {1}, counts


def count_uses(built: Any) -> dict[str, int]:
    """Forward calls of tile modules and gradient writes of all parameters, as they come."""
    counts: dict[str, int] = collections.Counter()

    def count(name: str) -> Any:
        def hook(*args: Any) -> None:
            counts[name] += 1

        return hook

    for name, module in built.named_modules():
        if isinstance(module, (WeightTile, MLPTile)):
            module.register_forward_hook(count(f"{name} forward"))
    for name, parameter in built.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(f"{name} written"))
    return counts


class Engine:
    """What ZeRO-3 does to a model, in short: a tile's data is there in its forward and its backward pass only."""

    def __init__(self, built: Any) -> None:
        self.alive = self.most = self.gathers = 0
        self.data: dict[Parameter, torch.Tensor] = {}
        for module in built.modules():
            if isinstance(module, (WeightTile, MLPTile)):
                module.register_forward_pre_hook(lambda module, args: self.gather(module))
                module.register_forward_hook(self.after_forward)
                self.left = {}
                for parameter in module.parameters():
                    self.data[parameter] = parameter.data
                    parameter.data = torch.empty(0)
                    parameter.register_post_accumulate_grad_hook(self.written(module))

    def gather(self, module: torch.nn.Module) -> None:
        self.gathers += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        for parameter in module.parameters():
            parameter.data = self.data[parameter]

    def release(self, module: torch.nn.Module) -> None:
        self.alive -= 1
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    def after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.release(module)
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda grad: self.gather(module))

    def written(self, module: torch.nn.Module) -> Any:

        def hook(parameter: Parameter) -> None:
            self.left.setdefault(module, []).append(parameter)
            if len(self.left[module]) == len(list(module.parameters())):
                del self.left[module]
                self.release(module)

        return hook


def check_engine() -> None:
    """Weights may go away between and after the two passes; never more than one tile is there, gathered twice."""
    for name in MODELS:
        expected = step(model(name))
        tiled = model(name, CONFIG)
        engine = Engine(tiled)
        tiles = sum(isinstance(module, (WeightTile, MLPTile)) for module in tiled.modules())
        loss = tiled(**batch())
        loss.mean().backward()
        assert engine.most == 1 and engine.alive == 0, (engine.most, engine.alive)
        assert engine.gathers == 2 * tiles, (engine.gathers, tiles)
        for parameter, data in engine.data.items():
            parameter.data = data
        assert_same({"loss": loss.detach()} | dense_gradients(tiled), expected)


def check_spec() -> None:
    """Built from a spec, joined by tile(): the same model again."""
    name = "swiglu with biases, sequence parallel"
    provider = TiledSpecProvider(3, storage="partitioned", splits={"qkv": (1, 2)})
    built = model(name, spec=provider.tiled(get_gpt_layer_local_spec()))
    assert str(built.decoder.layers[0].self_attention.linear_qkv.grid) == "1x2"
    parameters = set(built.parameters())
    reports = {report.name: report for report in tile(built, CONFIG)}
    fc1, qkv = (reports[f"decoder.layers.0.{name}"] for name in ("mlp.linear_fc1", "self_attention.linear_qkv"))
    assert fc1.partitioned and fc1.mlp == "decoder.layers.0.mlp" and fc1.kept_tiles == 0
    assert qkv.partitioned and qkv.mlp is None
    assert len(parameters - set(built.parameters())) == 1  # the output layer's dense weight, which no spec builds
    assert_same(step(built), step(model(name)))


def check_tied() -> None:
    """A weight that is the embedding's too stays whole."""
    built = model("gelu", share_embeddings_and_output_weights=True)
    reports = {report.name: report for report in tile(built, CONFIG)}
    assert reports["output_layer"].reason == "tied to the embedding, whose weight stays whole"
    assert type(built.output_layer) is ColumnParallelLinear
    assert_same(step(built), step(model("gelu", share_embeddings_and_output_weights=True)))


def check_plain_checkpoints() -> None:
    """``load_state_dict`` of dense weights; what is missing or of another shape is named."""
    name = "swiglu with biases, sequence parallel"
    state = scrambled(model(name)).state_dict()
    tiled = model(name, CONFIG)
    tiled.load_state_dict(state)
    assert_states_equal(tiled.state_dict(), state)
    dense = model(name)
    dense.load_state_dict(tiled.state_dict())
    assert_states_equal(dense.state_dict(), state)
    for missing in ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_proj.weight"):
        partial = {key: value for key, value in state.items() if key != missing}
        result = tiled.load_state_dict(partial, strict=False)
        assert result.missing_keys == [missing] and result.unexpected_keys == [], result
    wrong = state | {"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(3, 4)}
    try:
        tiled.load_state_dict(wrong)
    except RuntimeError as error:
        assert "decoder.layers.0.mlp.linear_fc1.weight: cannot load [3, 4]" in str(error)
    else:
        raise AssertionError("a wrong shape is not refused")


def scrambled(built: Any) -> Any:
    """With other weights than those drawn, equal on replicas; experts of other ranks have others."""
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    state = {}
    for key, value in built.state_dict().items():
        shift = 0.25 + (0.125 * expert_rank if ".experts." in key else 0)
        state[key] = value if value is None or not value.is_floating_point() else 1.5 * value + shift
    built.load_state_dict(state)
    return built


def assert_states_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert value is None or torch.equal(actual[key], value), key


def check_sharded_entries() -> None:
    """The tiles cover stock's entries: same keys, shapes, values and replicas; optimizers find every parameter."""
    for name in MODELS:
        for metadata in ({}, {"singleton_local_shards": True}):
            dense, tiled = model(name), model(name, CONFIG)
            expected, found = sharded(dense, metadata), sharded(tiled, metadata)
            entries = collections.defaultdict(list)
            for entry in pieces(found):
                entries[entry.key].append(entry)
            for entry in pieces(expected):
                assert_covers(entries[entry.key], entry)
            assert {entry.key for entry in pieces(expected)} == set(entries)
            mapped = get_param_id_to_sharded_param_map(sharded(tiled, metadata), list(tiled.parameters()))
            assert len(mapped) == len(list(tiled.parameters()))


def sharded(built: Any, metadata: dict[str, Any]) -> Any:
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return built.sharded_state_dict(metadata=metadata | groups)


def pieces(state: Any) -> Iterator[ShardedTensor]:
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def assert_covers(tiles: list[ShardedTensor], entry: ShardedTensor) -> None:
    """Those of ``tiles`` that lie within a stock entry hold its values, without a gap."""
    merged = torch.full(entry.local_shape, float("nan"), dtype=entry.dtype)
    axes = range(entry.prepend_axis_num, len(entry.global_offset))
    for tile_entry in tiles:
        start = [tile_entry.global_offset[axis] - entry.global_offset[axis] for axis in axes]
        if tile_entry.global_offset[: axes.start] != entry.global_offset[: axes.start]:
            continue
        if any(not 0 <= begin < size for begin, size in zip(start, entry.local_shape, strict=True)):
            continue
        assert tile_entry.global_shape == entry.global_shape and tile_entry.replica_id == entry.replica_id, entry.key
        assert tile_entry.allow_shape_mismatch == entry.allow_shape_mismatch, entry.key
        assert tile_entry.data is not None
        data = tile_entry.data.reshape(tile_entry.data.shape[-len(start) :])
        merged[tuple(slice(begin, begin + size) for begin, size in zip(start, data.shape, strict=True))] = data
    assert torch.equal(merged, entry.data), entry.key


def check_distributed_checkpoints() -> None:
    """Saved dense and continued in tiles; saved in tiles and continued in others, and dense."""
    for name in MODELS:
        source = scrambled(model(name))
        expected = source.state_dict()
        for tiling in (CONFIG, TilingConfig(factor=4, storage="partitioned"), UNMATCHED, None):
            target = model(name, tiling)
            folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
            dist.broadcast_object_list(folder)
            dist_checkpointing.save(sharded(source, {}), folder[0])
            target.load_state_dict(dist_checkpointing.load(sharded(target, {}), folder[0]))
            assert_states_equal(target.state_dict(), expected)
            source = target


def check_no_room_for_the_dense_weight() -> None:
    """Tiles are drawn one by one, with stock's attributes and bias, and the layer computes with them."""
    options: dict[str, Any] = {
        "config": make_config(tensor_model_parallel_size=2),
        "bias": True,
        "skip_bias_add": False,
    }
    shapes = []

    def init(weight: torch.Tensor) -> None:
        if weight.numel() > 1000:
            raise torch.OutOfMemoryError("the dense weight")
        shapes.append(tuple(weight.shape))
        torch.nn.init.normal_(weight)

    for stock_class, tiled_class, extra, grid in (
        (ColumnParallelLinear, PartitionedColumnParallelLinear, {}, (2, 3)),
        (RowParallelLinear, PartitionedRowParallelLinear, {"input_is_parallel": True}, (3, 2)),
    ):
        stock = stock_class(40, 48, init_method=torch.nn.init.normal_, **extra, **options)
        torch.manual_seed(1)
        layer = tiled_class(40, 48, init_method=init, in_splits=grid[0], out_splits=grid[1], **extra, **options)
        assert (layer.input_size, layer.output_size) == (40, 48) and len(shapes) == 6
        shapes.clear()
        weight = dense_weight(layer)
        assert weight.shape == stock.weight.shape and 0.8 < weight.std() < 1.2
        for parameter in weights(layer):
            assert vars(parameter) == vars(stock.weight), (vars(parameter), vars(stock.weight))
        other = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(other, weight, group=parallel_state.get_tensor_model_parallel_group())
        assert not torch.equal(*other), "tensor-parallel ranks drew the same"
        x = torch.randn(5, 1, weight.shape[1])
        with torch.no_grad():
            product = x @ weight.t()
            if tiled_class is PartitionedRowParallelLinear:
                dist.all_reduce(product, group=parallel_state.get_tensor_model_parallel_group())
            assert relative_error(layer(x)[0], product + layer.bias) < 1e-6


def check_layers_called_alone() -> None:
    """Hooks or a wrapper on fc1 send an MLP through stock's forward, on the units' weights."""
    dense, tiled = model("gelu"), model("gelu", CONFIG)
    seen = []
    for layer in tiled.decoder.layers:
        assert isinstance(layer.mlp, TiledMLP) and layer.mlp.reason_for_stock_forward() == ""
        layer.mlp.linear_fc1.register_forward_hook(lambda *args: seen.append(1))
        assert layer.mlp.reason_for_stock_forward() == "linear_fc1 has hooks"
    assert_same(step(tiled), step(dense))
    assert len(seen) == 2


def check_lists_between_layers() -> None:
    """fc1's list of paired out-tiles ``[gate_o | up_o]``, and fc2's list of in-tiles."""
    config = make_config(tensor_model_parallel_size=2, gated_linear_unit=True)
    options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.normal_, "bias": True}
    layers = []
    for cls, tiling in (
        (ColumnParallelLinear, {}),
        (PartitionedColumnParallelLinear, {"out_splits": 3, "combine_out_splits": False}),
    ):
        torch.manual_seed(0)
        layers.append(cls(32, 80, stride=2, tp_comm_buffer_name="fc1", **options, **tiling))
        layers[-1].bias.data.copy_(torch.arange(40))
    stock, fc1 = layers
    fc2 = PartitionedRowParallelLinear(40, 32, in_splits=3, input_is_parallel=True, skip_bias_add=True, **options)
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(1))
    gate, up = stock(x)[0].chunk(2, -1)
    tiles, _ = fc1(x)
    for o, tile_output in enumerate(tiles):
        columns = fc2.grid.columns(o)
        assert relative_error(tile_output, torch.cat([gate[..., columns], up[..., columns]], -1)) < 1e-6
    hidden = [F.silu(gate) * up for gate, up in (part.chunk(2, -1) for part in tiles)]
    assert torch.equal(fc2(hidden)[0], fc2(torch.cat(hidden, -1))[0])
    expect_error(lambda: fc2(hidden[:2]), "split into 2 parts, but the layer has in_splits=3")


def check_refusals() -> None:
    options: dict[str, Any] = {"config": make_config(), "init_method": torch.nn.init.normal_, "bias": False}
    column = PartitionedColumnParallelLinear
    weight, x = torch.zeros(4, 8), torch.randn(2, 8)
    expect_error(lambda: column(8, 8, skip_weight_param_allocation=True, **options), "skip_weight_param_allocation")
    expect_error(lambda: column(8, 8, fp32_accumulate=True, **options), "--tiled-linear-fp32-accumulate")
    expect_error(lambda: column(8, 8, **options)(x, weight=weight), "takes no weight=")
    expect_error(lambda: TilingConfig(fp32_accumulate=True, storage="partitioned"), "--tiled-linear-fp32-accumulate")
    gated = SWIGLU | {"tensor_model_parallel_size": 2}
    expect_error(
        lambda: tile(gpt(make_config(**gated)), TilingConfig(splits={"fc1": (1, 21)}, storage="partitioned")),
        "fc1=1x21",
    )


def main() -> None:
    with megatron(**SIZES):
        checks = [check for name, check in globals().items() if name.startswith("check_")]
        for check in checks:
            with naming(check.__name__):
                check()
        if dist.get_rank() == 0:
            print(f"{len(checks)} checks of partitioned models passed")


if __name__ == "__main__":
    main()

"""Tiling never shows in a checkpoint: entries, files and optimizer state of dense and tiled models are the same.

torchrun --standalone --nproc-per-node 2 -m tests.trainer.check_checkpoints FOLDER

Every check runs with the two ranks as a tensor-parallel and as a data-parallel group. Stock Megatron 0.19.2 cannot
resume a distributed optimizer on torch's AdamW, which takes apex's or TransformerEngine's: `assert len(steps) == 1`
wants a step made, and its loaders look for a tensor `step` that they leave out themselves. Here an optimizer
that has made a step takes the state, and `without_step_tensors` helps the loaders.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_tiling import TilingConfig, tile
from megatron_tiling.resident.lm_head import TiledOutputLayer
from megatron_tiling.resident.mlp import TiledMLP
from tests.support.harness import megatron, peak_bytes

VOCABULARY, SEQUENCE, BATCH = 64, 12, 2
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "use_cpu_initialization": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
}
GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of model."""

    name: str
    settings: dict[str, Any]
    tied: bool
    experts: int | None = None
    latent: bool = False


VARIANTS = [
    Variant("GELU, bias, tied", {}, tied=True),
    Variant("SwiGLU, grouped queries, untied", GATED | {"num_query_groups": 2}, tied=False),
    Variant(
        "experts, shared expert",
        GATED | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 48},
        tied=False,
        experts=4,
    ),
    Variant("latent attention", GATED | MLA | {"rope_type": "rope"}, tied=False, latent=True),
]
CORE_WIDTHS = ("k_channels", "v_channels")
RUNNABLE = [variant for variant in VARIANTS if not variant.latent]
TILINGS = {
    "dense": None,
    "factor 3": TilingConfig(factor=3, modules="all"),
    "factor 8, keep none": TilingConfig(factor=8, mlp_keep=0),
    "stock MLP and head around tiled layers": TilingConfig(
        factor=3, modules=("qkv", "proj", "fc1", "fc2"), splits={"fc1": (2, 3)}
    ),
}
# The fourth format that the docstring of 0.19.2 lists, fully_sharded_model_space, is refused by its own ShardedTensor
# ("flattened_range is not supported"), and fsdp_dtensor belongs to Megatron-FSDP.
OPTIMIZER_FORMATS = ["dp_reshardable", "fully_reshardable", "dp_zero_gather_scatter"]


class LatentAttentionCore(DotProductAttention):
    """Lets stock's latent attention be built without TransformerEngine, for its parameters: it does not run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{name: value for name, value in kwargs.items() if name not in CORE_WIDTHS})


def gpt(variant: Variant, tiling: str, seed: int = 3) -> GPTModel:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(11)
    config_class = MLATransformerConfig if variant.latent else TransformerConfig
    config = config_class(
        **BASE,
        **variant.settings,
        tensor_model_parallel_size=tp,
        sequence_parallel=bool(variant.experts) and tp > 1,
    )
    spec = get_gpt_layer_local_spec(variant.experts, moe_grouped_gemm=False, multi_latent_attention=variant.latent)
    if variant.latent:
        spec.submodules.self_attention.submodules.core_attention = LatentAttentionCore
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        SEQUENCE,
        share_embeddings_and_output_weights=variant.tied,
        position_embedding_type="rope" if variant.latent else "learned_absolute",
    )
    if (plan := TILINGS[tiling]) is not None:
        tile(model, plan)
        assert isinstance(model.output_layer, TiledOutputLayer) == ("output" in plan.tiled_modules)
        assert any(isinstance(module, TiledMLP) for module in model.modules()) == ("output" in plan.tiled_modules)
    return model


def metadata(**more: Any) -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)} | more


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, LocalNonpersistentObject):
        tree = tree.unwrap()
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def expanded(sharded_state_dict: Any) -> dict[str, Any]:
    """Leaves by path, with factories (a gated fc1's two halves, a fused qkv) expanded into what they save."""
    apply_factories(sharded_state_dict)
    return dict(leaves(sharded_state_dict))


def description(entry: Any) -> Any:
    """All that Megatron stores or asks about an entry, apart from its numbers."""
    if isinstance(entry, ShardedBase):
        fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
        return type(entry), {name: value for name, value in fields.items() if name != "data"}
    if isinstance(entry, torch.Tensor):
        return entry.shape, entry.dtype
    return entry


def assert_same_entries(actual: Any, expected: Any) -> None:
    actual, expected = expanded(actual), expanded(expected)
    assert list(actual) == list(expected)
    for path, entry in expected.items():
        assert description(actual[path]) == description(entry), path


def assert_equal(actual: Any, expected: Any) -> None:
    """Same leaves, bit for bit; sharded entries by their data. The padding of buckets is memory never written."""
    actual, expected = dict(leaves(actual)), dict(leaves(expected))
    assert actual.keys() == expected.keys()
    padding = {path.removesuffix("/padding") for path, value in expected.items() if path.endswith("/padding") and value}
    expected = {path: value for path, value in expected.items() if path.rpartition("/")[0] not in padding}
    for path, value in expected.items():
        pair = [entry.data if isinstance(entry, ShardedBase) else entry for entry in (actual[path], value)]
        if isinstance(pair[1], torch.Tensor):
            assert torch.equal(*pair), path
        else:
            assert dict(leaves(pair[0])).keys() == dict(leaves(pair[1])).keys(), path


def check_entries(variant: Variant, folder: Path) -> None:
    """Keys, global shapes, offsets, fragmentations and replica ids are stock's, in Megatron's old and new layouts."""
    dense = gpt(variant, "dense")
    for tiling in TILINGS:
        model = gpt(variant, tiling)
        assert_equal(model.state_dict(), dense.state_dict())
        assert_equal(model.state_dict_for_save_checkpoint(), dense.state_dict_for_save_checkpoint())
        for options in ({}, {"singleton_local_shards": True}):
            assert_same_entries(
                model.sharded_state_dict(metadata=metadata(**options)),
                dense.sharded_state_dict(metadata=metadata(**options)),
            )


def check_round_trips(variant: Variant, folder: Path) -> None:
    """What one tiling saves, another loads, bit for bit: torch_dist, fully parallel or not, and legacy."""
    for number, (source, target) in enumerate((*itertools.pairwise(TILINGS), (list(TILINGS)[-1], "dense"))):
        saved, loaded = gpt(variant, source), gpt(variant, target, seed=4)
        strategy = TorchDistSaveShardedStrategy()
        if number % 2:
            strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group())
        place = new_folder(folder, f"{variant.name} {number}")
        dist_checkpointing.save(saved.sharded_state_dict(metadata=metadata()), place, strategy)
        loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(metadata=metadata()), place))
        assert_equal(loaded.state_dict(), saved.state_dict())
        file = place / f"legacy.{torch.distributed.get_rank()}.pt"
        torch.save(saved.state_dict_for_save_checkpoint(), file)
        loaded = gpt(variant, target, seed=4)
        loaded.load_state_dict(torch.load(file, weights_only=False))
        assert_equal(loaded.state_dict(), saved.state_dict())


def new_folder(folder: Path, name: str) -> Path:
    place = folder / f"TP={parallel_state.get_tensor_model_parallel_world_size()}" / name
    place.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    return place


def trained(variant: Variant, tiling: str, distributed: bool, seed: int = 3) -> tuple[DistributedDataParallel, Any]:
    """A model and its optimizer after two steps, so that both have state."""
    model = gpt(variant, tiling, seed)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=distributed), [wrapped]
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
        wrapped.zero_grad_buffer()
        mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
        positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        wrapped(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean().backward()
        finalize_model_grads([wrapped])
        optimizer.step()
    return wrapped, optimizer


def optimizer_state(wrapped: DistributedDataParallel, optimizer: Any, loading: bool, **more: Any) -> Any:
    model = wrapped.module.sharded_state_dict(metadata=metadata(**more))
    return optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata(**more))


def check_plain_optimizer(variant: Variant, folder: Path) -> None:
    """The optimizer's entries are stock's, and its state goes from any tiling to any other."""
    states = {tiling: trained(variant, tiling, distributed=False) for tiling in TILINGS}
    for number, (source, target) in enumerate((*itertools.pairwise(TILINGS), (list(TILINGS)[-1], "dense"))):
        assert_same_entries(optimizer_state(*states[source], False), optimizer_state(*states["dense"], False))
        place = new_folder(folder, f"plain optimizer, {variant.name} {number}")
        fresh = trained(variant, target, distributed=False, seed=5)
        dist_checkpointing.save(optimizer_state(*states[source], False), place)
        fresh[1].load_state_dict(dist_checkpointing.load(optimizer_state(*fresh, True), place))
        assert_equal(fresh[1].state_dict(), states[source][1].state_dict())
        fresh = trained(variant, target, distributed=False, seed=5)
        fresh[1].load_state_dict(states[source][1].state_dict())
        assert_equal(fresh[1].state_dict(), states[source][1].state_dict())


@contextlib.contextmanager
def without_step_tensors() -> Iterator[None]:
    """Lets stock's loaders skip the `step` of torch's AdamW, which they restore from elsewhere."""
    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: DistributedOptimizer, parameter: torch.Tensor, tensors: dict[str, Any]) -> None:
        stock(self, parameter, {"step": None} | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = stock


def check_distributed_optimizer(variant: Variant, folder: Path) -> None:
    """The same for each sharding format that Megatron knows: from dense as a tensor-parallel group, else to it."""
    states = {tiling: trained(variant, tiling, distributed=True) for tiling in ("dense", "factor 8, keep none")}
    source, target = states if parallel_state.get_tensor_model_parallel_world_size() > 1 else reversed(states)
    for kind in OPTIMIZER_FORMATS:
        formats = {"distrib_optim_sharding_type": kind}
        assert_same_entries(
            optimizer_state(*states[source], False, **formats), optimizer_state(*states[target], False, **formats)
        )
        fresh = trained(variant, target, distributed=True, seed=5)
        place = new_folder(folder, f"{kind}, {variant.name}, {source}")
        dist_checkpointing.save(optimizer_state(*states[source], False, **formats), place)
        loaded = dist_checkpointing.load(optimizer_state(*fresh, True, **formats), place)
        with torch.no_grad(), without_step_tensors():  # stock copies into float32 parameters in place
            fresh[1].load_state_dict(loaded)
        assert_equal(
            expanded(optimizer_state(*fresh, False, **formats)),
            expanded(optimizer_state(*states[source], False, **formats)),
        )


def savings_and_loadings(wrapped: DistributedDataParallel, optimizer: Any, place: Path) -> list[Callable[[], Any]]:
    """What a run does with checkpoints: distributed save and load, legacy save and load."""
    model, file = wrapped.module, place / f"legacy.{torch.distributed.get_rank()}.pt"

    def load() -> None:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=metadata()), place))

    def load_legacy() -> None:
        state = torch.load(file, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return [
        lambda: dist_checkpointing.save(model.sharded_state_dict(metadata=metadata()), place),
        load,
        lambda: torch.save(
            {"model": model.state_dict_for_save_checkpoint(), "optimizer": optimizer.state_dict()}, file
        ),
        load_legacy,
    ]


def check_memory(variant: Variant, folder: Path) -> None:
    """Saving and loading hold no more bytes of tensors at once than stock."""
    peaks: dict[str, list[int]] = {}
    size = 0
    for tiling in ("dense", "factor 8, keep none"):
        wrapped, optimizer = trained(variant, tiling, distributed=False)
        place = new_folder(folder, f"memory, {variant.name}, {tiling}")
        peaks[tiling] = [peak_bytes(step) for step in savings_and_loadings(wrapped, optimizer, place)]
        size = sum(parameter.nbytes for parameter in wrapped.parameters())
        assert peaks[tiling][-1] >= 3 * size, "weights and two moments are read: the measurement misses some"
    dense, tiled = peaks.values()
    assert all(ours <= stock for ours, stock in zip(tiled, dense, strict=True)), peaks
    if torch.distributed.get_rank() == 0:
        print(f"{variant.name}: bytes at once to save, load, and in the legacy format, weights {size}: {peaks}")


def main() -> None:
    folder = Path(sys.argv[1])
    checks = [
        (check, variant)
        for name, check in globals().items()
        if name.startswith("check_")
        for variant in (RUNNABLE if "optimizer" in name or "memory" in name else VARIANTS)
    ]
    with megatron():
        for tp in (torch.distributed.get_world_size(), 1):
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
            for check, variant in checks:
                check(variant, folder)
            if torch.distributed.get_rank() == 0:
                print(f"{len(checks)} checkpoint checks passed at TP={tp}", flush=True)


if __name__ == "__main__":
    main()

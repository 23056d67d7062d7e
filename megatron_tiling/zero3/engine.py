"""Tiled Megatron models on DeepSpeed ZeRO-3, with tensor parallelism: each tile is a parameter that the engine owns.

``build`` makes a model of partitioned tiled layers whose parameters are divided over the data-parallel ranks as they
are made; ``initialize`` hands it to the engine, with thresholds that follow the tile size. What Megatron's trainer
does to gradients of parameters that tensor-parallel ranks share is done here, as the engine knows nothing of it.

Hazards: ZeRO-3 replaces a partitioned parameter's data by an empty tensor, so ``parameter.shape`` says nothing
(``whole_shape`` does); and DeepSpeed chooses its accelerator when it is first imported, so this module imports it late.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tiling.log import log_on_rank_0
from megatron_tiling.partitioned.mlp import PartitionedMLP
from megatron_tiling.partitioned.modules import TILE_MODULES
from megatron_tiling.tiles.ownership import gathered, is_owned, whole_shape, whole_size
from megatron_tiling.zero3.checkpoint_check import refuse_other_tiles
from megatron_tiling.zero3.config import (
    Config,
    TileSizes,
    pointless_settings,
    with_thresholds,
    without_auto,
)
from megatron_tiling.zero3.gather import TileGathering, reason_against
from megatron_tiling.zero3.host_memory import require_host_memory

#: Megatron's process groups under the names by which DeepSpeed asks for them. "Model parallel" is tensor parallel, as
#: there are no pipeline stages. Functions of sequence parallelism must be missing: DeepSpeed means another kind by it.
MODEL_PARALLEL_UNIT = SimpleNamespace(
    **{
        f"get_{theirs}_{what}": getattr(parallel_state, f"get_{ours}_{what}")
        for theirs, ours in {
            "model_parallel": "tensor_model_parallel",
            "tensor_model_parallel": "tensor_model_parallel",
            "pipeline_model_parallel": "pipeline_model_parallel",
            "data_parallel": "data_parallel",
        }.items()
        for what in ("rank", "world_size", "group")
    },
    get_tensor_model_parallel_src_rank=parallel_state.get_tensor_model_parallel_src_rank,
    get_data_parallel_group_ranks=lambda: torch.distributed.get_process_group_ranks(
        parallel_state.get_data_parallel_group()
    ),
)


def import_deepspeed() -> ModuleType:
    """DeepSpeed, on the CPU where there is no GPU."""
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not gpu:  # its own CPU collectives are compiled at the first start; gloo will do
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def build(model: Callable[[], torch.nn.Module], transformer: Any, config: Config) -> torch.nn.Module:
    """``model()``, every parameter divided over the data-parallel ranks as soon as its module is built.

    Args:
        model: builds the model, from partitioned layers if it is to be tiled.
        transformer: the ``TransformerConfig`` that ``model`` builds from.
        config: DeepSpeed's, ZeRO stage 3.

    Raises:
        ValueError: the host has too little memory, or no library, for the offload that ``config`` asks for.
    """
    deepspeed = import_deepspeed()
    zero = config["zero_optimization"]
    devices = {(zero.get(name) or {}).get("device") for name in ("offload_param", "offload_optimizer")}
    if "cpu" in devices:
        with on_meta(transformer):
            parameters = list(model().parameters())
        ranks = parallel_state.get_data_parallel_world_size()
        partition = sum(-(-parameter.numel() // ranks) for parameter in parameters)
        require_host_memory(config, partition, transformer.params_dtype.itemsize)
    if "nvme" in devices and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offload to nvme needs DeepSpeed's async_io, which cannot be compiled here: install libaio and its "
            "headers (libaio-dev, libaio-devel), or offload to cpu"
        )
    # It takes over Megatron's process groups. Without them, zero.Init counts one rank, and refuses the batch sizes.
    deepspeed.init_distributed()
    with (
        deepspeed.zero.Init(
            data_parallel_group=parallel_state.get_data_parallel_group(),
            config_dict_or_path=without_auto(config),  # thresholds matter to the engine only
            mpu=MODEL_PARALLEL_UNIT,
            tensor_overrides=[],  # drawn as Megatron draws; in the engine's dtype, rotary frequencies lose precision
        ),
        _parameters_in(transformer.params_dtype),
        _gathering_initialisation(transformer),
    ):
        return model()


@contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Float32 parameters of torch's own modules (norms, position embeddings) are made in the model's dtype.

    Megatron casts the built model; here parameters are divided before it is built.
    """

    def cast(module: torch.nn.Module, name: str, parameter: Tensor | None) -> Any:
        if parameter is None or parameter.dtype != torch.float32 or dtype == torch.float32:
            return None
        return torch.nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(cast)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _gathering_initialisation(transformer: Any) -> Iterator[None]:
    """Initialisation of a child's parameter by its parent, which finds it partitioned, works on the whole of it.

    Megatron draws its position embeddings so; on the empty tensor that ZeRO-3 leaves, torch's own values would stay.
    """
    names = ("init_method", "output_layer_init_method", "embedding_init_method")
    stock = {name: getattr(transformer, name) for name in names}
    for name, method in stock.items():
        setattr(transformer, name, functools.partial(_initialise_whole, method))
    try:
        yield
    finally:
        for name, method in stock.items():
            setattr(transformer, name, method)


def _initialise_whole(method: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    if not is_owned(tensor):
        return method(tensor)
    whole = torch.empty(whole_shape(tensor))
    method(whole)  # in the dtype and on the device in which Megatron draws the parameters of torch's modules
    with gathered(tensor, write=True):
        tensor.data.copy_(whole)
    return tensor


def initialize(
    model: torch.nn.Module,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    config: Config,
    *,
    deepspeed_gathers: bool = False,
) -> Any:
    """The DeepSpeed engine of a model from ``build``.

    Prints on rank 0 the thresholds that it chose, a warning for each setting under which tiles save nothing, and why
    DeepSpeed's own hooks gather the tiles, if they do.

    Args:
        make_optimizer: given parameter groups as Megatron's optimizer makes them (``wd_mult`` 0 for biases and norms).
        config: DeepSpeed's; unset or ``"auto"`` thresholds follow the tile size.
        deepspeed_gathers: leave the tiles to DeepSpeed's own hooks, which take more of the host's time.
    """
    deepspeed = import_deepspeed()
    sizes = tile_sizes(model)
    config = without_auto(config if sizes is None else with_thresholds(config, sizes))
    against = ""  # gathering tiles by hooks of our own
    if sizes is not None:
        zero = config["zero_optimization"]
        chosen = {key: zero[key] for key in zero if key.startswith("stage3_") or key == "reduce_bucket_size"}
        log_on_rank_0(f"ZeRO-3 with tiles of at most {sizes.largest} elements: {chosen}")
        reasons = pointless_settings(config, sizes)
        for reason in reasons:
            log_on_rank_0(f"WARNING: zero_optimization.{reason}")
        against = "asked for" if deepspeed_gathers else "see above" if reasons else reason_against(config)
        if against:
            log_on_rank_0(f"DeepSpeed's own hooks gather the tiles: {against}")
    reduce_shared_gradients(model)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(parameter_groups(model)), config=config, mpu=MODEL_PARALLEL_UNIT
    )
    refuse_other_tiles(model)
    for module in model.modules():
        if isinstance(module, PartitionedMLP):
            module.register_forward_pre_hook(_gather_biases)
    if sizes is not None and not against:
        TileGathering(engine.module, config["zero_optimization"]["stage3_prefetch_bucket_size"])
    return engine


def _gather_biases(mlp: Any, *_: Any) -> None:
    """A tiled MLP reads biases of layers that it does not call. DeepSpeed sees to that in the engine's forward only."""
    for layer in (mlp.linear_fc1, mlp.linear_fc2):
        if layer.bias is not None and is_owned(layer.bias):
            layer.bias.all_gather()


def tile_sizes(model: torch.nn.Module) -> TileSizes | None:
    """Sizes of the tiles in a model's partitioned layers, or ``None`` if it has none.

    A tile of a ``TiledMLP``, which is gathered as one, is a tile of fc1 and one of fc2.
    """
    layers: dict[str, list[int]] = {}
    weights: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, TILE_MODULES):
            sizes = [whole_size(parameter) for parameter in module.parameters()]
            layers.setdefault(name.rpartition(".tiles.")[0], []).append(sum(sizes))
            weights += sizes
    if not layers:
        return None
    return TileSizes(min(weights), max(map(max, layers.values())), max(map(sum, layers.values())))


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """As Megatron groups them: no weight decay for vectors, whatever their partitioned shape."""
    groups: dict[float, list[Tensor]] = {1.0: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[1.0 if len(whole_shape(parameter)) > 1 else 0.0].append(parameter)
    return [{"params": params, "wd_mult": mult, "lr_mult": 1.0} for mult, params in groups.items() if params]


def reduce_shared_gradients(model: torch.nn.Module) -> None:
    """Sum the gradients of parameters that tensor-parallel ranks share but use on different tokens or heads.

    The parameters and the operation are those of Megatron's ``finalize_model_grads``: norms and row biases under
    sequence parallelism, and the norms of queries and keys. Done as each gradient is made, before ZeRO-3 reduces it.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    config: Any = model.config
    for name, parameter in model.named_parameters():
        average = getattr(parameter, "average_gradients_across_tp_domain", False)
        shared = average or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        shared = shared or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
        if parameter.requires_grad and shared:
            parameter.register_hook(functools.partial(_reduced, group, average))


def _reduced(group: torch.distributed.ProcessGroup, average: bool, grad: Tensor) -> Tensor:
    grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still need what it handed over
    torch.distributed.all_reduce(grad, group=group)
    return grad / group.size() if average else grad


@contextmanager
def on_meta(transformer: Any) -> Iterator[None]:
    """Megatron's layers are built with neither memory nor random numbers."""
    wanted = transformer.use_cpu_initialization, transformer.perform_initialization
    transformer.use_cpu_initialization, transformer.perform_initialization = True, False
    try:
        # Torch draws from the generators for meta tensors, too.
        with (
            torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []),
            torch.device("meta"),
        ):
            yield
    finally:
        transformer.use_cpu_initialization, transformer.perform_initialization = wanted

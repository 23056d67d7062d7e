"""verl (tested with 0.9.1): a module for ``actor_rollout_ref.model.external_lib``, with MEGATRON_TILING set.

Importing it hooks ``verl.utils.megatron_utils.make_megatron_module`` and ``verl.models.mcore.init_mcore_model``: models
of Megatron-Bridge, of mbridge and of verl itself come out tiled, before adapters and before Megatron wraps them.

With ``output`` among the modules it also hooks ``linear_cross_entropy`` of ``verl.models.mcore.model_forward_fused``,
which ``use_fused_kernels=True`` calls for log-probabilities and entropies; without fused kernels verl makes logits.
"""

import functools
import importlib
import inspect
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tiling.config import TilingConfig
from megatron_tiling.integrations.bridge import tile_provider
from megatron_tiling.integrations.settings import config_from_environment, symbol
from megatron_tiling.resident.comm import column_comm
from megatron_tiling.resident.lm_head import head_tiles
from megatron_tiling.tiles.head import HeadLoop, head_scores
from megatron_tiling.tiles.softmax import LogitScale
from megatron_tiling.trainer.hook import tiling_hook

TESTED = "verl 0.9.1"


def install() -> None:
    """Hook verl's two functions, once.

    Raises:
        ImportError: verl has moved one of them.
        ValueError: ``MEGATRON_TILING`` is missing or refused.
    """
    config = config_from_environment()
    make = symbol("verl.utils.megatron_utils", "make_megatron_module", TESTED)
    init = symbol("verl.models.mcore", "init_mcore_model", TESTED)
    if hasattr(make, "tiling_config"):
        return
    if "output" in config.tiled_modules:
        _hook_scores(config)
    signature = inspect.signature(make)
    if missing := {"bridge", "provider"} - signature.parameters.keys():
        raise ImportError(f"make_megatron_module of verl takes no {', '.join(missing)}; tested with {TESTED}")
    tiles = tiling_hook(config)

    @functools.wraps(make)
    def tiled_module(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        provider, bridge = given.arguments["provider"], given.arguments["bridge"]
        if provider is not None:
            tile_provider(provider, config)
        elif bridge is not None and not hasattr(bridge.get_model, "tiling_config"):
            bridge.get_model = _with_callback(bridge.get_model)
        return make(*args, **kwargs)

    def _with_callback(get_model: Any) -> Any:
        @functools.wraps(get_model)
        def tiled_get_model(*args: Any, post_model_creation_callbacks: Any = (), **kwargs: Any) -> Any:
            def tile_one(model: Any, **unused: Any) -> Any:
                return tiles([model])[0]

            callbacks = [tile_one, *post_model_creation_callbacks]
            return get_model(*args, post_model_creation_callbacks=callbacks, **kwargs)

        tiled_get_model.tiling_config = config  # type: ignore[attr-defined]
        return tiled_get_model

    @functools.wraps(init)
    def tiled_init(*args: Any, **kwargs: Any) -> Any:
        return tiles([init(*args, **kwargs)])[0]

    tiled_module.tiling_config = config  # type: ignore[attr-defined]
    importlib.import_module("verl.utils.megatron_utils").make_megatron_module = tiled_module  # type: ignore[attr-defined]
    importlib.import_module("verl.models.mcore").init_mcore_model = tiled_init  # type: ignore[attr-defined]


def _hook_scores(config: TilingConfig) -> None:
    stock = symbol("verl.models.mcore.model_forward_fused", "linear_cross_entropy", TESTED)

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As verl's: ``[tokens]`` both. But it sums the gradient of hidden states over ranks, where verl forgets to.

        With sequence parallelism the gather before it does. Without, verl leaves each rank its own columns' part.
        """
        if reduction != "none":
            return stock(hidden, weight, labels, temperature, reduction, dist_process_group)
        group = dist_process_group
        is_gathered = "GatherFromSequenceParallelRegion" in type(hidden.grad_fn).__name__
        sums = group is not None and group.size() > 1 and not is_gathered
        comm = column_comm(group, sequence_parallel=False, allreduce_dgrad=sums)
        scale = LogitScale(temperature=temperature)
        loop = HeadLoop(head_tiles(config), group, comm, scale=scale, entropy=True)
        scores = head_scores(hidden, weight, labels.reshape(-1, 1), loop)
        assert scores.entropy is not None
        return scores.log_probs.squeeze(1), scores.entropy

    module: Any = importlib.import_module("verl.models.mcore.model_forward_fused")
    module.linear_cross_entropy = linear_cross_entropy


install()

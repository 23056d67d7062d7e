"""The model provider for ``--custom-model-provider-path`` of slime and of trainers that come from it."""

import copy
from typing import Any

from megatron_tiling.arguments import validate_tiling_args
from megatron_tiling.config import TilingConfig
from megatron_tiling.integrations.settings import config_from_environment, refuse_partitioned, symbol
from megatron_tiling.trainer.hook import tiling_hook


def tiled_model(trainer: str, tested: str, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
    """The model that the trainer would build without the flag, tiled.

    A critic's ``output_layer`` is put there by the trainer afterwards, and is its own.

    Raises:
        ImportError: the trainer has moved its model provider.
        ValueError: no configuration, or one that is refused.
    """
    factory = symbol(f"{trainer}.backends.megatron_utils.model_provider", "get_model_provider_func", tested)
    args = symbol("megatron.training", "get_args", tested)()
    config = _config(args)
    refuse_partitioned(config, trainer)
    stock_args = copy.copy(args)
    stock_args.custom_model_provider_path = None
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    model = factory(stock_args)(pre_process=pre_process, post_process=post_process, **stage)
    return tiling_hook(config)([model])[0]


def _config(args: Any) -> TilingConfig:
    """Of the command line, where a script has given the parser our flags, or else of the environment."""
    given = validate_tiling_args(args) if hasattr(args, "use_tiled_linear") else None
    return config_from_environment() if given is None else given

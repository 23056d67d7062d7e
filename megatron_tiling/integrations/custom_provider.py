"""The model provider for ``--custom-model-provider-path`` of slime and of trainers that come from it."""

import copy
import os
from dataclasses import dataclass
from typing import Any

from megatron_tiling.arguments import validate_tiling_args
from megatron_tiling.config import VARIABLE, TilingConfig
from megatron_tiling.integrations.policy_logits import defer_logits, hook_scores
from megatron_tiling.integrations.settings import config_from_environment, refuse_partitioned, symbol
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.trainer.hook import tiling_hook


@dataclass(frozen=True)
class Trainer:
    """What is hooked in a trainer.

    Args:
        name: of its package.
        tested: versions.
        scores: the module that calls ``calculate_log_probs_and_entropy``.
        entropy_gradient: the argument of that function that says whether entropies carry a gradient.
        whole_with: arguments of it for which logits are made.
        whole_mode: the setting of the command line with which all logits are made.
    """

    name: str
    tested: str
    scores: str
    entropy_gradient: str
    whole_with: tuple[str, ...] = ()
    whole_mode: str = ""


def tiled_model(trainer: Trainer, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
    """The model that the trainer would build without the flag, tiled.

    A critic's ``output_layer`` is put there by the trainer afterwards, and is its own.

    Raises:
        ImportError: the trainer has moved what is hooked.
        ValueError: no configuration, or one that is refused.
    """
    provider = f"{trainer.name}.backends.megatron_utils.model_provider"
    factory = symbol(provider, "get_model_provider_func", trainer.tested)
    args = symbol("megatron.training", "get_args", trainer.tested)()
    config = _config(args)
    refuse_partitioned(config, trainer.name)
    stock_args = copy.copy(args)
    stock_args.custom_model_provider_path = None
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    model = factory(stock_args)(pre_process=pre_process, post_process=post_process, **stage)
    model = tiling_hook(config)([model])[0]
    if post_process and "output" in config.tiled_modules:
        hook_scores(trainer.scores, trainer.tested, trainer.entropy_gradient, trainer.whole_with)
        mode = trainer.whole_mode
        reason = f"--{mode.replace('_', '-')}" if mode and getattr(args, mode, False) else defer_logits(model)
        if reason:
            log_on_rank_0(f"logits for log-probabilities stay whole: {reason}")
    return model


def _config(args: Any) -> TilingConfig:
    """Of the command line, where a script has given the parser our flags, or else of the environment."""
    given = validate_tiling_args(args) if hasattr(args, "use_tiled_linear") else None
    if given is not None and os.environ.get(VARIABLE):
        log_on_rank_0(f"{VARIABLE} has no effect beside --use-tiled-linear: the flags say what is tiled")
    return config_from_environment() if given is None else given

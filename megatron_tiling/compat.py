"""The one place that knows Megatron versions apart: megatron-core 0.16 to 0.19, told by what they have."""

import importlib.util
from collections.abc import Callable
from typing import Any

#: Functions of ``megatron.training.argument_utils`` whose configs carry ``pre_wrap_hooks``.
CONFIG_FUNCTIONS = ("gpt_config_from_args", "hybrid_config_from_args")


def model_config_functions() -> list[Callable[..., Any]]:
    """The functions that turn arguments into a config from which the trainer builds a model.

    0.18 builds hybrid models in this way, 0.19 GPT models too; all others come from a model provider.
    """
    if importlib.util.find_spec("megatron.training.models") is None:
        return []
    import megatron.training.argument_utils as argument_utils

    return [getattr(argument_utils, name) for name in CONFIG_FUNCTIONS if hasattr(argument_utils, name)]

"""A ``TilingConfig`` from the environment, for trainers whose command line has no place for our flags.

MEGATRON_TILING="factor=8 keep=0 modules=fc1,fc2,output splits=fc1=1x16,fc2=16x1"
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

from megatron_tiling.arguments import number_or_text
from megatron_tiling.config import VARIABLE, TilingConfig, parse_splits, words_of

#: Settings, and what reads their values; ``keep`` is ``mlp_keep``.
READERS = {
    "factor": number_or_text,
    "keep": number_or_text,
    "modules": words_of,
    "splits": parse_splits,
    "head_keep": number_or_text,
    "head_memory_mib": number_or_text,
    "head_tokens": number_or_text,
}


def config_from_environment(environment: Mapping[str, str] = os.environ) -> TilingConfig:
    """What ``MEGATRON_TILING`` asks for, of resident tiles.

    Raises:
        ValueError: it is not there or empty, names a setting that there is none of or one twice, or a value that
            ``TilingConfig`` refuses.
    """
    text = environment.get(VARIABLE, "").split()
    if not text:
        raise ValueError(f'{VARIABLE} is not set: say what to tile, as in {VARIABLE}="factor=8 keep=0"')
    given: dict[str, Any] = {}
    for setting in text:
        name, _, value = setting.partition("=")
        if name not in READERS or name in given:
            raise ValueError(f"{VARIABLE}: {setting}: write each of {', '.join(READERS)} once at most, as NAME=VALUE")
        try:
            given[name] = READERS[name](value)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}: {setting}: {error}") from None
    if "keep" in given:
        given["mlp_keep"] = given.pop("keep")
    try:
        return TilingConfig(**given)
    except ValueError as error:  # naming flags
        raise ValueError(f'{VARIABLE}="{" ".join(text)}": {error}') from None


def symbol(module: str, name: str, tested: str) -> Any:
    """``module.name`` of a trainer.

    Raises:
        ImportError: it is not there: another version has moved it.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"megatron_tiling hooks {module}.{name}, which is not there ({error}); it was tested with {tested}"
        ) from error
    return found


def refuse_partitioned(config: TilingConfig, trainer: str) -> None:
    """Refuse tiles that are parameters of their own.

    Raises:
        ValueError: naming the flag.
    """
    if config.partitioned:
        raise ValueError(
            f"--tiled-linear-storage partitioned: {trainer} loads and exports whole weights, which partitioned layers "
            "do not have; use resident"
        )

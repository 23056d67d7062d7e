"""miles (read at its main branch of August 2026): as slime, from which it comes.

``MEGATRON_TILING="factor=8 keep=0"`` and ``--custom-model-provider-path`` of this module's ``model_provider``.
"""

from typing import Any

from megatron_tiling.integrations.custom_provider import tiled_model


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """The model of miles, tiled; errors as ``custom_provider.tiled_model``."""
    return tiled_model("miles", "the main branch of miles of 2026-08-21", pre_process, post_process, vp_stage)

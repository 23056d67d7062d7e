"""miles (read at its main branch of August 2026): as slime, from which it comes.

``MEGATRON_TILING="factor=8 keep=0"`` and ``--custom-model-provider-path`` of this module's ``model_provider``.
Log-probabilities are computed by ``miles.backends.training_utils.loss_hub.logit_processors``. Its true on-policy mode
rounds whole logits, which are made there.
"""

from typing import Any

from megatron_tiling.integrations.custom_provider import Trainer, tiled_model

MILES = Trainer(
    "miles",
    tested="the main branch of miles of 2026-08-21",
    scores="miles.backends.training_utils.loss_hub.logit_processors",
    entropy_gradient="entropy_requires_grad",
    whole_mode="true_on_policy_mode",
)


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """The model of miles, tiled; errors as ``custom_provider.tiled_model``."""
    return tiled_model(MILES, pre_process, post_process, vp_stage)

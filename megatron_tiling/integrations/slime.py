"""slime (read at its main branch of August 2026): ``--custom-model-provider-path`` of this module's ``model_provider``.

    MEGATRON_TILING="factor=8 keep=0 modules=fc1,fc2,output" python train.py ... \
        --custom-model-provider-path megatron_tiling.integrations.slime.model_provider

With ``output`` among the modules, ``calculate_log_probs_and_entropy`` of ``slime.backends.megatron_utils.loss`` is
hooked, and log-probabilities and entropies are computed without logits. Rollouts' top-p replay has its logits made.

slime's parser drops flags that it does not know. A train.py of one's own gives it ours:
``slime.utils.arguments.parse_args(add_custom_arguments=megatron_tiling.arguments.add_tiling_args)``.
"""

from typing import Any

from megatron_tiling.integrations.custom_provider import Trainer, tiled_model

SLIME = Trainer(
    "slime",
    tested="slime's main branch of 2026-08-21",
    scores="slime.backends.megatron_utils.loss",
    whole_with=("log_prob_keep_mask",),
    entropy_gradient="with_entropy_grad",
)


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """slime's own model, tiled; errors as ``custom_provider.tiled_model``."""
    return tiled_model(SLIME, pre_process, post_process, vp_stage)

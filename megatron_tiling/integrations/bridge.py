"""Megatron-Bridge (tested with 0.6.2): its model providers build tiled models.

    bridge = AutoBridge.from_hf_pretrained(path)
    provider = tile_provider(bridge.to_megatron_provider(), TilingConfig(factor=8))

Hooks ``ModelProviderMixin.register_pre_wrap_hook``: the model is tiled after its Hugging Face weights are loaded and
before adapters are put around layers, which ``pretrain`` and ``finetune`` do; any other order works too.
"""

from collections.abc import Callable
from typing import Any

from megatron_tiling.config import TilingConfig
from megatron_tiling.integrations.settings import config_from_environment, refuse_partitioned
from megatron_tiling.log import log_on_rank_0
from megatron_tiling.trainer.hook import tiling_hook


def tile_provider[P](provider: P, config: TilingConfig | None = None, *, native_loss: bool = False) -> P:
    """Make a provider's models come out tiled.

    Args:
        provider: what ``AutoBridge.to_megatron_provider`` or a recipe gives (``ConfigContainer.model``).
        config: what to tile; ``MEGATRON_TILING`` says so if it is left out.
        native_loss: compute the loss with Megatron's own function, whose logits are tiled, where the provider asks
            for TransformerEngine's (``cross_entropy_fusion_impl``), which needs them whole.

    Returns:
        The provider. A second call with the same config changes nothing.

    Raises:
        ImportError: the provider has no pre-wrap hooks.
        ValueError: the config is partitioned; the provider is tiled by another config already.
    """
    config = config_from_environment() if config is None else config
    refuse_partitioned(config, "Megatron-Bridge")
    model: Any = provider
    for hook in getattr(model, "_pre_wrap_hooks", getattr(model, "pre_wrap_hooks", ())):
        if (given := getattr(hook, "tiling_config", None)) is not None:
            if given != config:
                raise ValueError(f"this provider is tiled by {given} already, and not by {config}")
            return provider
    if getattr(model, "cross_entropy_loss_fusion", False) and model.cross_entropy_fusion_impl == "te":
        if native_loss:
            model.cross_entropy_fusion_impl = "native"
        elif "output" in config.tiled_modules:
            log_on_rank_0(
                "cross_entropy_fusion_impl te takes whole logits: the output layer's stay whole; "
                "tile_provider(provider, config, native_loss=True) computes the loss in tiles"
            )
    ours: Any = tiling_hook(config)
    ours.tiling_config = config
    _register(model)(ours)
    return provider


def _register(model: Any) -> Callable[[Any], None]:
    if hasattr(model, "register_pre_wrap_hook"):
        return model.register_pre_wrap_hook
    if isinstance(getattr(model, "pre_wrap_hooks", None), list):  # a ModelConfig
        return model.pre_wrap_hooks.append
    raise ImportError(
        f"megatron_tiling hooks register_pre_wrap_hook of Megatron-Bridge's providers, which {type(model).__name__} "
        "does not have; it was tested with megatron-bridge 0.6.2"
    )

"""ms-swift on mcore-bridge (tested with mcore-bridge 1.6.5): a file for ``--external_plugins``, with MEGATRON_TILING.

Importing it hooks ``build_model`` of ``mcore_bridge.model.register.ModelLoader`` and its subclasses: models come out
tiled, before weights are loaded and before adapters are put around layers.
"""

import functools
from typing import Any

from megatron_tiling.integrations.settings import config_from_environment, symbol
from megatron_tiling.trainer.hook import tiling_hook


def install() -> None:
    """Hook the loaders, once.

    Raises:
        ImportError: mcore-bridge has moved them.
        ValueError: ``MEGATRON_TILING`` is missing or refused.
    """
    config = config_from_environment()
    loader = symbol("mcore_bridge.model.register", "ModelLoader", "mcore-bridge 1.6.5")
    symbol("mcore_bridge.model.register", "ModelLoader.build_model", "mcore-bridge 1.6.5")
    tiles = tiling_hook(config)

    def hooked(build: Any) -> Any:
        @functools.wraps(build)
        def build_tiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            return tiles([build(self, *args, **kwargs)])[0]

        build_tiled.tiling_config = config  # type: ignore[attr-defined]
        return build_tiled

    classes = [loader]
    for one in classes:
        classes += one.__subclasses__()
    for one in dict.fromkeys(classes):
        build = vars(one).get("build_model")
        if build is not None and not hasattr(build, "tiling_config"):
            one.build_model = hooked(build)


install()

"""The one place that knows Megatron versions apart: megatron-core 0.16 to 0.19, told by what they have."""

import importlib.util
from collections.abc import Callable
from typing import Any

from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer


def builders_of_configs() -> list[tuple[str, str]]:
    """Module and name of the function that builds and wraps a model from a model config, if there is one.

    0.18 builds hybrid models in this way, 0.19 GPT models too; all others come from a model provider.
    """
    module = "megatron.training.models.dist_utils"
    return [(module, "unimodal_build_distributed_models")] if exists(module) else []


def torch_fsdp2_trains() -> bool:
    """Whether Megatron's FSDP2 wrapper takes what its own trainer gives it; that of 0.16 to 0.18 does not."""
    return "finish_grad_sync" in vars(TorchFullyShardedDataParallel)


def drop_cuda_kernel_builds() -> None:
    """0.16's trainer builds CUDA kernels as it starts; later ones have none."""
    try:
        import megatron.legacy.fused_kernels as fused_kernels
    except ImportError:
        return
    fused_kernels.load = lambda args: None


def uses_transformer_engine(config: Any) -> bool:
    """Whether a layer spec for this config is to be TransformerEngine's.

    Raises:
        SystemExit: it is not installed.
    """
    wanted: bool = config.transformer_impl == "transformer_engine"
    if wanted and not exists("transformer_engine"):
        raise SystemExit(
            "megatron_tiling: --spec with --transformer-impl transformer_engine: TransformerEngine is not installed; "
            "install it, or use --transformer-impl local"
        )
    return wanted


def spec_may_be_a_function() -> bool:
    """Whether ``--spec MODULE NAME`` may name a function of the model's config (0.19), and not only a spec."""
    return exists("megatron.training.models.gpt")


def exists(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


class LayerSpecFromArgs(ModuleSpec):
    """The layer spec that the trainer's arguments ask for, for ``--spec`` of 0.16 to 0.18, which take an object.

    Such an object is there before the arguments are parsed, so this one looks at them when a model is built.

    Args:
        rewrite: what to make of the layer spec.
    """

    def __init__(self, rewrite: Callable[[Any], Any]) -> None:
        self.rewrite = rewrite
        super().__init__(TransformerLayer)

    @property
    def submodules(self) -> Any:
        """Those of every layer of the model.

        Raises:
            SystemExit: the model's layers differ, as dense and expert layers do.
        """
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        args = get_args()
        config = core_transformer_config_from_args(args)
        layers = get_gpt_decoder_layer_specs(
            config,
            use_transformer_engine=uses_transformer_engine(config),
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
        )
        if any(layer is not layers[0] for layer in layers):
            raise SystemExit(
                "megatron_tiling: --spec with layers that differ (--moe-layer-freq) needs megatron-core 0.19; "
                "use python -m megatron_tiling SCRIPT --use-tiled-linear"
            )
        return self.rewrite(layers[0]).submodules

    @submodules.setter
    def submodules(self, value: None) -> None:
        """The dataclass sets its default."""

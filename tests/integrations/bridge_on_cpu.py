"""Run a script of Megatron-Bridge's trainer without a GPU.

    PYTHONPATH=tests/stand_ins torchrun ... tests/integrations/bridge_on_cpu.py SCRIPT ARGUMENT...

TransformerEngine is the project's stand-in. What Bridge's trainer imports for data, resilience and compression that no
test asks for is stubbed: ``STUBS``. Fusions that only a GPU
has are switched off in the model's provider, and so is the fused loss.
"""

import functools
import runpy
import sys
from typing import Any

from tests.integrations import stubs

STUBS = ("datasets", "megatron.energon", "modelopt", "nvdlfw_inspect", "nvidia_resiliency_ext")
STUBS += ("torch.utils.tensorboard",)
FUSIONS = ("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion", "persist_layer_norm")
FUSIONS += ("cross_entropy_loss_fusion",)  # its gradient is rounded to bfloat16


def install() -> None:
    from megatron_tiling import cpu

    cpu.install(train=False)
    stubs.install(*STUBS)
    import megatron.bridge.models.gpt_provider as gpt_provider
    import megatron.bridge.peft.utils as peft_utils
    import megatron.bridge.training.eval as evaluation
    import megatron.bridge.training.initialize as initialize
    import megatron.bridge.training.setup as setup
    import megatron.bridge.training.train as train
    import megatron.core.datasets.utils as dataset_utils

    peft_utils.version = lambda name: "2.6.0"  # the stand-in has no package metadata
    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    setup.set_jit_fusion_options = lambda *args, **kwargs: None
    dataset_utils.compile_helpers = initialize.compile_helpers = lambda: None  # the wheel ships them built
    for module in (train, evaluation):  # of modelopt, a stub
        module.get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None
    finalize = gpt_provider.GPTModelProvider.finalize

    def without_fusions(self: Any) -> None:
        self.use_cpu_initialization = True
        for name in FUSIONS:
            setattr(self, name, False)
        finalize(self)

    gpt_provider.GPTModelProvider.finalize = without_fusions


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""A step of a training script on fake tensors, as one rank of many, and what the tracker saw of it.

The script runs as it is: Megatron parses and checks its arguments, builds the model and its optimizer, and
``megatron.training.training.train`` calls ``train_step``, which is where this ends. Replaced are the data, which are of
Megatron's shapes and have no values, checkpoints, which are not read, and process groups, which do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from megatron_tiling.plan import gpu, look, routing
from megatron_tiling.plan.clock import CLOCK
from megatron_tiling.plan.curve import Moments, Point
from megatron_tiling.plan.process_groups import fake_process_groups
from megatron_tiling.plan.tracker import Tracker
from megatron_tiling.plan.transformer_engine.refused import NoFigures
from megatron_tiling.tiles.planned_steps import planned_memory
from megatron_tiling.trainer.phases import module_kinds


@dataclass(frozen=True)
class Run:
    """What a run on one rank needs.

    Args:
        peak: bytes, as ``torch.cuda.max_memory_allocated`` counts them.
        parts: their sum, by what they are.
        phase: what runs at the peak.
        flops: of matrix products in the micro-batches that were looked at.
        seconds: that the kernels of a step take, with all of its micro-batches.
        curve: of the step, if it is asked for.
        untrained: trainable parameters that no gradient reaches.
    """

    peak: int
    parts: dict[str, int]
    phase: str
    flops: float
    seconds: float
    curve: tuple[Point, ...] = ()
    untrained: int = 0


class _Planned(BaseException):
    """Ends the script: all is seen."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run


def prepare(with_transformer_engine: bool = False, expert_imbalance: float | None = None, script: str = "") -> Tracker:
    """What all runs share: this process is for planning from here on. Plans run in forks of it.

    Args:
        expert_imbalance: if it is given, runs in which it has no effect are refused.
        script: in a Megatron-LM tree, that tree is what is imported.
    """
    if script:
        _put_on_path(script)
    tracker = Tracker(on_operation=CLOCK.operation)
    gpu.install(tracker, with_transformer_engine)
    routing.install(expert_imbalance)
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _read_docstrings_once()
    from megatron_tiling.trainer.install import install

    install()
    gc.collect()
    gc.freeze()  # forks do not look through all of this again, which takes most of what a collection does
    return tracker


def plan(tracker: Tracker, script: str, argv: list[str], world: int, rank: int, draw: bool = False) -> Run:
    """Run ``script`` with the arguments ``argv`` as one rank of ``world``. Once a process, after ``prepare``.

    Args:
        draw: with the curve.

    Raises:
        SystemExit: as Megatron or the script ends on bad arguments.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    sys.argv = [script, *argv]
    _put_on_path(script)
    fake_process_groups(world, rank)
    _install_seams(tracker, draw)
    try:
        runpy.run_path(script, run_name="__main__")
    except _Planned as planned:
        return planned.run
    except NoFigures as refused:
        raise SystemExit(str(refused).split(" when instantiating ")[0]) from None  # which Megatron adds
    except SystemExit as ended:
        if ended.code:
            raise
    raise SystemExit(f"megatron_tiling plan: {script} ended before Megatron's trainer took a step")


def _put_on_path(script: str) -> None:
    """A script's folder, as for ``python SCRIPT``."""
    folder = os.path.dirname(os.path.abspath(script))
    if sys.path[0] != folder:
        sys.path.insert(0, folder)


def _read_docstrings_once() -> None:
    """Megatron parses the sources of its classes of arguments three times a run, for texts of --help."""
    from argparse import ArgumentParser

    from megatron.training import argument_utils, arguments

    factory: Any = getattr(argument_utils, "ArgumentGroupFactory", None)  # of 0.17 and newer
    if factory is not None:
        stock = factory._get_field_docstrings
        read = functools.cache(lambda owner: stock(factory.__new__(factory), owner))
        factory._get_field_docstrings = lambda self, owner: read(owner)
        arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def _install_seams(tracker: Tracker, draw: bool) -> None:
    import megatron.training.arguments as arguments
    import megatron.training.global_vars as global_vars
    import megatron.training.training as training
    from megatron.core import mpu
    from megatron.core.datasets import utils as datasets
    from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import get_args

    import megatron_tiling.trainer.install as trainer

    stock_validate = arguments.validate_args
    stock_pretrain, stock_setup, stock_step = training.pretrain, training.setup_model_and_optimizer, training.train_step
    stock_number, stock_backward = training.get_num_microbatches, schedules.backward_step
    backward_passes: list[tuple[float, float]] = []  # of a step: seconds and FLOPs

    @functools.wraps(stock_validate)
    def validate(args: Namespace, *more: Any, **options: Any) -> Any:
        _refuse(args)  # before Megatron refuses what the planner's TransformerEngine lacks, with other advice
        look.leave_out_writing(args)
        return stock_validate(args, *more, **options)

    @functools.wraps(stock_pretrain)
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        tracker.kinds = module_kinds()
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            return stock_pretrain(*args, **kwargs)

    @functools.wraps(stock_setup)
    def setup(*args: Any, **kwargs: Any) -> Any:
        settings = get_args()
        _refuse(settings)  # again, of what Megatron has read deprecated flags as
        settings.load = settings.pretrained_checkpoint = None
        if settings.pipeline_model_parallel_size > 1:  # other stages, which are not asked here, may have tiles
            trainer.reasons_for_no_tiles = lambda chunks: None
        with tracker.phase("building the model"):
            model, optimizer, scheduler = stock_setup(*args, **kwargs)
        mark_model(tracker, model)
        tracker.mark_live("optimizer states", built="building the model")
        return model, optimizer, scheduler

    @functools.wraps(stock_step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(stock_step).bind(*args, **kwargs).arguments
        for owner, name, kind in (
            (call["optimizer"], "step", "optimizer step"),
            (call["config"], "finalize_model_grads_func", "gradient reduction"),
        ):
            setattr(owner, name, _as_phase(tracker, kind, getattr(owner, name)))
        if not call["optimizer"].step()[0]:  # which makes its states
            raise SystemExit("megatron_tiling plan: the optimizer takes no step on values that are not there")
        tracker.mark_live("optimizer states", built="optimizer step")
        if stock_number() < wanted_microbatches():  # the peak may be in the first, which makes what is held for good
            stock_step(*args, **kwargs)
        tracker.reset_peak()
        CLOCK.clear()
        backward_passes.clear()
        moments = Moments(tracker, CLOCK) if draw else None
        untrained = _without_gradients(call["model"])
        stock_step(*args, **kwargs)
        tracker.mark("symmetric memory", planned_memory())
        always = {"cuBLAS workspaces": gpu.CUBLAS_WORKSPACES}
        parts = tracker.parts() | always
        seconds = CLOCK.once + (CLOCK.seconds - CLOCK.once) * stock_number() / number_of_microbatches()
        curve = moments.curve(always) if moments else ()
        peak, phase = sum(parts.values()), str(tracker.peak.phase)
        raise _Planned(Run(peak, parts, phase, CLOCK.flops, seconds, curve, len(untrained)))

    def wanted_microbatches() -> int:
        """As many as it takes until a pipeline's stage holds the most that it ever does, and one more."""
        settings = get_args()
        stages = settings.pipeline_model_parallel_size
        if settings.virtual_pipeline_model_parallel_size is not None:
            return 2 * max(stages, settings.microbatch_group_size_per_vp_stage or 0)
        return int(stages - mpu.get_pipeline_model_parallel_rank() + 1)

    def number_of_microbatches() -> int:
        return min(stock_number(), wanted_microbatches())

    @functools.wraps(stock_backward)
    def backward_step(input_tensor: Any, *args: Any) -> Any:
        """Megatron's, but for those that find fewer micro-batches kept than others did: what they free is freed.

        Two run with the most, the last one reduces gradients. The work of all is counted. All run to be drawn.
        """
        is_interleaved = get_args().virtual_pipeline_model_parallel_size is not None
        if draw or is_interleaved or not 2 <= len(backward_passes) < number_of_microbatches() - 1:
            seconds, flops = CLOCK.seconds, CLOCK.flops
            result = stock_backward(input_tensor, *args)
            backward_passes.append((CLOCK.seconds - seconds, CLOCK.flops - flops))
            return result
        backward_passes.append(backward_passes[-1])
        CLOCK.seconds += backward_passes[-1][0]
        CLOCK.flops += backward_passes[-1][1]
        return tree_map_only(Tensor, torch.empty_like, input_tensor)

    def batch(shapes: look.Shapes) -> dict[str, Tensor]:
        made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        tracker.keep_on_host(made.values())
        return made

    build_tokenizer: Any = global_vars.build_tokenizer
    replaced = {
        stock_validate: validate, build_tokenizer: look.naming_another_tokenizer(build_tokenizer),
        training.pretrain: pretrain, training.setup_model_and_optimizer: setup, training.train_step: train_step,
        training.build_train_valid_test_data_iterators: look.data_iterators(batch),
        datasets.compile_helpers: lambda: None,  # of helpers that read data, in a tree by its Makefile
    }  # fmt: skip
    trainer.replace_in_all_modules({id(stock): new for stock, new in replaced.items()})
    training.get_num_microbatches = number_of_microbatches
    optimizer: Any = MixedPrecisionOptimizer
    optimizer._unscale_main_grads_and_check_for_nan = _finite(optimizer._unscale_main_grads_and_check_for_nan)
    schedules.backward_step = backward_step


def _as_phase(tracker: Tracker, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with tracker.phase(kind), CLOCK.once_a_step():
            return function(*args, **kwargs)

    return call


def _finite(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Steps are taken, as most are: gradients in float16 would be found to be neither finite nor not."""

    @functools.wraps(check)
    def found_inf(optimizer: Any) -> bool:
        check(optimizer)
        return False

    return found_inf


def _without_gradients(chunks: list[torch.nn.Module]) -> set[int]:
    """Trainable parameters, by ``id``, of which each leaves once a gradient has reached it."""
    left = set()
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad):
        left.add(id(parameter))
        parameter.register_post_accumulate_grad_hook(lambda reached: left.discard(id(reached)))
    return left


def mark_model(tracker: Tracker, chunks: list[torch.nn.Module]) -> None:
    """Say what the parameters of these are, and the buffers of DDP that hold them and their gradients."""
    for chunk in chunks:
        for buffer in (*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ())):
            tracker.mark("weights", [buffer.param_data])
            tracker.mark("gradients", [buffer.grad_data])
        tracker.mark("weights", chunk.parameters())


#: What scripts that train import, once for all runs.
_IMPORTED = (
    "megatron.training.training",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.models",
)
#: Arguments of what cannot be planned yet, and what they are called.
_REFUSED = {
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "fp8_param_gather": "--fp8-param-gather",
    "te_precision_config_file": "--te-precision-config-file",
    "fp8_dot_product_attention": "--fp8-dot-product-attention",
    "fp8_multi_head_attention": "--fp8-multi-head-attention",
    "fp8_output_proj": "--fp8-output-proj",
    "fp4": "--fp4-format",
    "multi_latent_attention": "--multi-latent-attention",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "hybrid_override_pattern": "--hybrid-override-pattern",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "cpu_offloading_num_layers": "--cpu-offloading-num-layers",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "sft": "--sft",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "tp_comm_overlap": "--tp-comm-overlap",
    "perform_rl_step": "--perform-rl-step",
    "skip_train": "--skip-train",
    "moe_use_upcycling": "--moe-use-upcycling",
    "moe_shared_expert_overlap": "--moe-shared-expert-overlap",  # memory of two streams
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "moe_paged_stash": "--moe-paged-stash",
    "moe_enable_routing_replay": "--moe-enable-routing-replay",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
    "heterogeneous_layers_config_encoded_json": "--heterogeneous-layers-config-encoded-json",
    "experimental_attention_variant": "--experimental-attention-variant",
    "yaml_cfg": "--yaml-cfg",  # which the command that is planned does not show
    "use_mp_args_from_checkpoint_args": "--use-mp-args-from-checkpoint-args",
    "rampup_batch_size": "--rampup-batch-size",  # whose first steps have fewer micro-batches than the later ones
    "step_batch_size_schedule": "--step-batch-size-schedule",
    "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute",  # holds logits' gradients of all micro-batches
    "logits_save_dir": "--logits-save-dir",
    "freeze_all_layers": "--freeze-all-layers",
    "deepspeed_config": "--deepspeed-config",
    "nccl_ub": "--use-nccl-ub",  # whose buffers are of another allocator
    "init_model_with_meta_device": "--init-model-with-meta-device",
}


def _refuse(args: Namespace) -> None:
    asked = [flag for name, flag in _REFUSED.items() if getattr(args, name, None)]
    for name, *priced in (
        ("cuda_graph_impl", "none"),
        ("transformer_impl", "local", "transformer_engine"),
        ("optimizer", "adam"),
        ("moe_token_dispatcher_type", "allgather", "alltoall"),
        ("fp8_recipe", "delayed", "tensorwise", "blockwise"),
    ):
        if getattr(args, name, priced[0]) not in priced:
            asked.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    if getattr(args, "moe_expert_capacity_factor", None) and not args.moe_pad_expert_input_to_capacity:
        asked.append("--moe-expert-capacity-factor without --moe-pad-expert-input-to-capacity")  # drops by values
    if getattr(args, "fp8", None):
        asked += ["--num-experts with --fp8-format"] * bool(args.num_experts)
    if asked:
        raise SystemExit(f"megatron_tiling plan: {', '.join(asked)}: not planned yet; leave out this to plan the rest")
    if reason := routing.reason_for_no_imbalance(args):
        raise SystemExit(f"megatron_tiling plan: {reason}")

"""What a run leaves out that only looks at a step: checkpoints, logs, data. Of a plan, and of a measured run."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Arguments by which a run writes to disks, sends to services, or ends early; and without.
_LEFT_OUT: dict[str, object] = {
    **dict.fromkeys((
        "tensorboard_dir", "wandb_project", "ckpt_convert_format", "save_params_interval", "save_activations_interval",
        "save_tokens_per_expert_interval", "save_wgrads_interval", "save_dgrads_interval", "exit_interval",
        "exit_duration_in_mins", "logits_save_dir", "dump_param_to_param_group_map", "moe_routing_trace_path",
    )),
    **dict.fromkeys((
        "enable_one_logger", "log_progress", "profile", "record_memory_history", "enable_ft_package",
        "run_workload_inspector_server", "adlr_autoresume",
    ), False),
    "config_logger_dir": "",
}  # fmt: skip
#: A batch's tensors by their names: shapes and dtypes.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def leave_out_writing(args: Namespace) -> None:
    """Of Megatron's arguments, before they are checked."""
    vars(args).update((name, without) for name, without in _LEFT_OUT.items() if name in args)


def naming_another_tokenizer(build: Callable[..., Any]) -> Callable[..., Any]:
    """Around Megatron's ``build_tokenizer``: of a tokenizer that is not on this machine a look needs the size alone.

    Raises:
        SystemExit: it cannot be built, with why, and the flags that do without.
    """

    @functools.wraps(build)
    def build_or_end(args: Namespace, *more: Any, **options: Any) -> Any:
        try:
            return build(args, *more, **options)
        except Exception as error:  # of any tokenizer's package
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise SystemExit(
                f"megatron_tiling plan: --tokenizer-type {args.tokenizer_type}: it cannot be built here ({why}); give "
                "--tokenizer-type NullTokenizer --vocab-size N in its place, N the number of its words"
            ) from error

    return build_or_end


def batches(args: Namespace, make: Callable[[Shapes], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Micro-batches without end, of the names and shapes of Megatron's."""
    shape = args.micro_batch_size, args.seq_length
    shapes: Shapes = {name: (shape, torch.int64) for name in ("tokens", "labels", "position_ids")}
    shapes["loss_mask"] = shape, torch.float32
    if getattr(args, "create_attention_mask_in_dataloader", False):
        shapes["attention_mask"] = (args.micro_batch_size, 1, args.seq_length, args.seq_length), torch.bool
    while True:
        yield make(shapes)


def data_iterators(make: Callable[[Shapes], dict[str, Tensor]]) -> Callable[..., tuple[Any, None, None]]:
    """In the place of Megatron's ``build_train_valid_test_data_iterators``, which it calls for each model chunk.

    Ranks that read no data have none. Nothing is evaluated.
    """

    def build(*unused: Any, **also_unused: Any) -> tuple[Any, None, None]:
        from megatron.core import mpu
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import get_args

        args = get_args()
        args.do_train, args.do_valid, args.do_test = True, False, False
        if mpu.get_tensor_model_parallel_rank() != 0:
            return None, None, None
        return RerunDataIterator(batches(args, make)), None, None

    return build

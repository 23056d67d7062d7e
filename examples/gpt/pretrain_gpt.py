"""Pretrain a GPT on Megatron-LM's own trainer, with tiled linear layers where `--use-tiled-linear` is given.

    torchrun --standalone --nproc-per-node 2 -m megatron_tiling examples/gpt/pretrain_gpt.py MEGATRON_FLAGS

Every flag of Megatron's trainer works, apart from those in `REFUSED`. The one line that makes this a tiling
script is `megatron_tiling.install()`; the rest tells Megatron how to read a batch, compute a loss and build
the data sets. Written for megatron-core 0.19, whose wheel has the trainer but no such script.

Hazards: `get_batch` is collective over the tensor-parallel group, so every rank of a group takes the same
path through it; and data sets are built on the pipeline stages that read them and on no others.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers, get_tokenizer, inprocess_restart, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

import megatron_tiling
from megatron_tiling import cpu

# A checkpoint is written by helper processes, which import this script under another name.
if __name__ == "__main__" and not torch.cuda.is_available() and not cpu.installed():
    sys.exit(f"No GPU here: start this script with `torchrun ... -m megatron_tiling {sys.argv[0]} ...`")

# Adds --use-tiled-linear and its companions to Megatron's parser, and to its trainer the step that makes each
# model tiled. Without the flag nothing changes: that run is the dense baseline. The runner has called it already,
# and then it does nothing here.
megatron_tiling.install()

REFUSED = {
    "sft": "--sft",
    "hybrid_context_parallel": "--hybrid-context-parallel",  # feeds on --sft batches
    "logits_load_dir": "--logits-load-dir",  # its loss is not in megatron-core's wheel
    "perform_rl_step": "--perform-rl-step",
}
"""Flags that ask for another batch, loss or loop than pretraining's."""

BATCH_KEYS = [
    *["tokens", "labels", "loss_mask", "position_ids", "attention_mask"],
    *["cu_seqlens", "cu_seqlens_padded", "max_seqlen"],  # of packed documents
]
"""What a micro-batch may hold. A blend's samples also name their data set: not for the model."""

SPIKE = 10.0  # --check-for-spiky-loss: a loss this many times the largest one seen

straggler_timer = StragglerDetector()


def has_mtp(config: Any, vp_stage: int | None) -> bool:
    """Whether this pipeline stage has multi-token-prediction layers."""
    layout, layers = config.pipeline_model_parallel_layout, config.mtp_num_layers
    return mtp_on_this_rank(layout=layout, mtp_num_layers=layers, ignore_virtual=False, vp_stage=vp_stage)


def reads_data(config: Any, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs tokens or labels."""
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def get_batch(data_iterator: Iterator[dict] | None, config: Any, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next micro-batch: read by TP rank 0, broadcast, cut for context parallelism.

    Empty on a pipeline stage that needs nothing of it. With --dataloader-inter-document-masking every stage
    needs the document bounds (`cu_seqlens`), and samples are laid end to end.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    if not packed and not reads_data(config, vp_stage):
        return {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:  # the others have no data set
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not reads_data(config, vp_stage):
        return batch
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=packed,  # documents do not divide into 2 x CP chunks
    )


def packed_sequence(batch: dict[str, Any]) -> PackedSeqParams | None:
    """What attention needs to keep documents apart, or None where a sample is one sequence."""
    if batch.get("cu_seqlens") is None:
        return None
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    padded = batch.get("cu_seqlens_padded")
    padded = None if padded is None else padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)  # the FLOP count of the log
    bounds = cu_seqlens if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def token_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the unmasked tokens' losses, their number, and both for the log; Megatron divides.

    Checked here, before any reduction, so that a NaN is laid at the rank that made it.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    args, checker = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "NaN in the loss", True), (torch.isinf, "Inf in the loss", True)]
    if args.check_for_spiky_loss:
        spike = functools.partial(checker.is_unexpectedly_large, threshold=SPIKE, context="loss")
        checks.append((spike, "spike in the loss", False))
    for bad, message, fatal in checks:
        checker.validate_result(result=total, rejection_func=bad, message=message, tolerance=0.0, fatal=fatal)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def forward_step(data_iterator: Any, model: torch.nn.Module, return_schedule_plan: bool = False) -> Any:
    """One micro-batch forward: the model's output (or its schedule plan), and the loss to take of it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, get_model_config(model), vp_stage)
        packing = packed_sequence(batch)
    timers("batch-generator").stop()

    inputs = [batch.get(key) for key in ("tokens", "position_ids", "attention_mask")]
    targets = {key: batch.get(key) for key in ("labels", "loss_mask")}
    loss = functools.partial(token_loss, targets["loss_mask"])
    with straggler_timer:
        if return_schedule_plan:  # --overlap-moe-expert-parallel-comm
            return get_attr_wrapped_model(model, "build_schedule_plan")(*inputs, **targets), loss
        return model(*inputs, **targets, packed_seq_params=packing), loss


def dataset_config(args: Any) -> GPTDatasetConfig:
    """The data flags as the data sets take them."""
    kind = GPTFIMDatasetConfig if args.fim_data else GPTDatasetConfig
    settable = (field.name for field in dataclasses.fields(kind) if field.init)
    options = {name: getattr(args, name) for name in settable if hasattr(args, name)}
    # ... and those that go by another name there
    options["blend"], options["blend_per_split"] = get_blend_and_blend_per_split(args)
    options |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "inter_document_masking": args.dataloader_inter_document_masking,
        "sequence_parallel_size": args.tensor_model_parallel_size if args.sequence_parallel else 0,
    }
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            options["sequences_per_dataset"] = json.load(file)
    if args.fim_data:
        roles = ("prefix", "middle", "suffix", "pad", "eod")
        options["fim_extra_tokens"] = {role: getattr(args, f"fim_{role}_token") for role in roles}
    return kind(**options)


def dataset_kind(args: Any) -> type:
    """The kind of data set that the flags ask for."""
    return MockGPTDataset if args.mock_data else GPTFIMDataset if args.fim_data else GPTDataset


def build_datasets(kind: type, num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test sets of `num_samples`, on the ranks that read them (None elsewhere)."""
    args = get_args()
    config = core_transformer_config_from_args(args)

    def reads() -> bool:
        packed = args.dataloader_inter_document_masking
        return mpu.get_tensor_model_parallel_rank() == 0 and (packed or reads_data(config, vp_stage))

    print_rank_0(f"> building {kind.__name__}s of {num_samples} samples ...")
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads, dataset_config(args)).build()


def datasets_of(kind: type) -> Any:
    """`build_datasets` for one kind, as Megatron's trainer takes it."""
    build: Any = functools.partial(build_datasets, kind)
    build.is_distributed = True  # every rank calls it: the builder is collective
    return build


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold the word embeddings: first, last if tied, and those with MTP layers."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def parse_args(refused: dict[str, str], add_flags: Callable[[Any], Any] | None = None) -> Any:
    """Megatron's flags and ours, and those of a script, checked; ends the program at one of those `refused`."""
    args = parse_and_validate_args(add_flags, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    if asked := [flag for name, flag in refused.items() if getattr(args, name)]:
        sys.exit(f"{', '.join(asked)}: not in this example; run Megatron-LM's own script the same way")
    return args


def train(args: Any, kind: type, step: Callable[..., Any] = forward_step) -> None:
    """Hand over to Megatron's trainer, with data sets of a `kind` and the `step` of a micro-batch."""
    trainer, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    trainer(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_of(kind),
        ModelType.encoder_or_decoder,
        step,
        store=store,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    parsed = parse_args(REFUSED)
    train(parsed, dataset_kind(parsed))

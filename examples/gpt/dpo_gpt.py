r"""Direct preference optimization of a GPT, tiled where `--use-tiled-linear` is given.

    torchrun --standalone --nproc-per-node 2 -m megatron_tiling examples/gpt/dpo_gpt.py \
        --pretrained-checkpoint DENSE --save TUNED --load TUNED --data-path PREFERENCES.jsonl MEGATRON_FLAGS

A line of the data is `{"prompt": "...", "chosen": "...", "rejected": "..."}`. Samples 2i and 2i + 1 of a micro-batch
are the chosen and the rejected answer of a pair. The reference is the model of `--pretrained-checkpoint`, frozen.
Neither model makes logits. The rest is `finetune_gpt.py`.
"""

import functools
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import finetune_gpt
import pretrain_gpt
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.checkpointing import load_checkpoint
from torch import Tensor

from megatron_tiling import score_processor

KEYS = ("prompt", "chosen", "rejected")


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--dpo-beta", type=float, default=0.1, help="What margins of log-probabilities are scaled by.")
    return parser


class PreferenceDataset(finetune_gpt.PairDataset):
    """Two samples a line of a JSONL file, of its prompt and the chosen, then the rejected answer."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> list[finetune_gpt.Pair]:
        return finetune_gpt.read_pairs(Path(dataset_path), KEYS)

    def __len__(self) -> int:
        return max(2 * len(self.indices), self.num_samples or 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pair(int(index) // 2)
        return self.made(pair["prompt"], pair[KEYS[1 + int(index) % 2]])


@functools.cache
def reference_model() -> torch.nn.Module:
    """The model of `--pretrained-checkpoint`, once a process."""
    args = get_args()
    config = gpt_config_from_args(args)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    before = dict(vars(args))
    args.load, args.finetune, args.no_load_optim, args.no_load_rng, args.ckpt_step = None, True, True, True, None
    models: list[torch.nn.Module] = builder.build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(models, None, None)
    vars(args).clear()
    vars(args).update(before)
    return models[0].requires_grad_(False).eval()


def log_ratios(policy: torch.nn.Module, reference: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
    """`[b]`: log-probability of each sample's answer under the policy, less that under the reference."""
    inputs = [batch[key] for key in ("tokens", "position_ids", "attention_mask")]
    processor = score_processor(batch["labels"], mask=batch["loss_mask"] > 0)
    with torch.no_grad():
        expected = reference(*inputs, output_processor=processor).log_probs
    return (policy(*inputs, output_processor=processor).log_probs - expected).sum(dim=1)


def dpo_loss(beta: float, ratios: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the pairs' losses, their number, and what is logged; Megatron divides."""
    margins = beta * (ratios[0::2] - ratios[1::2])
    losses = -F.logsigmoid(margins)
    pairs = torch.tensor(len(losses), dtype=torch.int, device=losses.device)
    logged = {"dpo loss": losses, "dpo accuracy": (margins > 0).to(losses.dtype)}
    sums = {name: torch.stack([value.detach().sum(), pairs.to(losses.dtype)]) for name, value in logged.items()}
    return losses.sum(), pairs, sums


def forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
    """One micro-batch forward: log-ratios, and the loss to take of them."""
    batch = pretrain_gpt.get_batch(data_iterator, get_model_config(model), None)
    return log_ratios(model, reference_model(), batch), functools.partial(dpo_loss, get_args().dpo_beta)


def main() -> None:
    """Check the flags, then hand over to Megatron's trainer."""
    args = pretrain_gpt.parse_args(finetune_gpt.REFUSED | {"check_for_spiky_loss": "--check-for-spiky-loss"}, add_flags)
    for wrong, message in (
        (args.pretrained_checkpoint is None, "--pretrained-checkpoint, which the reference is"),
        (args.micro_batch_size % 2, f"an even --micro-batch-size, not {args.micro_batch_size}"),
        (args.dataloader_type != "single", f"--dataloader-type single, not {args.dataloader_type}"),
        (args.pipeline_model_parallel_size > 1, "one pipeline stage"),
        (args.context_parallel_size > 1, "no context parallelism"),
        (args.mtp_num_layers, "no --mtp-num-layers"),
    ):
        if wrong:
            sys.exit(f"dpo_gpt.py: give {message}")
    pretrain_gpt.train(args, PreferenceDataset, forward_step)


if __name__ == "__main__":
    main()

r"""Fine-tune a GPT on prompts and answers, from a dense Megatron checkpoint, tiled where `--use-tiled-linear` is given.

    torchrun --standalone --nproc-per-node 2 -m megatron_tiling examples/gpt/finetune_gpt.py \
        --pretrained-checkpoint DENSE --save TUNED --load TUNED --data-path PAIRS.jsonl MEGATRON_FLAGS

`DENSE` may come from any Megatron run, of any tensor-parallel size and without this package, and so may whatever goes
on from `TUNED`. A line of the data is `{"prompt": "...", "answer": "..."}`. One pair is one sample: Megatron's
local attention cannot keep several in a sequence apart. The loss counts the answer and the end-of-document token after
it. The rest is `pretrain_gpt.py`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pretrain_gpt
import torch
from megatron.core.datasets.megatron_dataset import MegatronDataset

Pair = dict[str, str]

REFUSED = pretrain_gpt.REFUSED | {
    "mock_data": "--mock-data",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "reset_position_ids": "--reset-position-ids",
    "reset_attention_mask": "--reset-attention-mask",
    "eod_mask_loss": "--eod-mask-loss",
}
"""Flags that ask for another batch than one pair a sample."""


def read_pairs(path: Path, keys: Sequence[str] = ("prompt", "answer")) -> list[Pair]:
    """The lines of a JSONL file, each with a text for each of `keys`, none but the first empty.

    Raises:
        SystemExit: there are none, or a line is another, with its number.
    """
    if not path.is_file():
        sys.exit(f"--data-path {path}: no such file; give a JSONL file of {', '.join(keys)}, with its suffix")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f"{path}, line {number}: not JSON ({error})")
        texts = [pair.get(key) if isinstance(pair, dict) else None for key in keys]
        if not all(isinstance(text, str) for text in texts) or not all(texts[1:]):
            wanted = ", ".join(f'"{key}": "..."' for key in keys)
            sys.exit(f"{path}, line {number}: write {{{wanted}}}, the {' and '.join(keys[1:])} not empty")
        pairs.append(pair)
    if not pairs:
        sys.exit(f"{path}: holds no pairs")
    return pairs


def sample(prompt: list[int], answer: list[int], end: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens, labels and loss mask `[length]` of a pair.

    A pair that is too long loses the beginning of its prompt; one whose answer alone is too long, its end.

    Args:
        prompt, answer: token ids, without an end.
        end: the token that ends the answer, and fills up short samples, there without a loss.
        length: tokens of a sample.
    """
    answer = [*answer, end][:length]
    prompt = prompt[max(0, len(prompt) + len(answer) - (length + 1)) :]
    padding = length + 1 - len(prompt) - len(answer)
    tokens = torch.tensor([*prompt, *answer, *[end] * padding])
    mask = torch.tensor([0.0] * len(prompt) + [1.0] * len(answer) + [0.0] * padding)
    return {"tokens": tokens[:-1].contiguous(), "labels": tokens[1:].contiguous(), "loss_mask": mask[1:].contiguous()}


class PairDataset(MegatronDataset):
    """Pairs of a JSONL file, in an order of their own in each epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not len(self.indices):
            sys.exit(f"--split {self.config.split}: leaves no pair of {self.dataset_path} for {self.index_split.name}")
        self._epoch, self._order = -1, np.arange(0)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> list[Pair]:
        return read_pairs(Path(dataset_path))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: list[Pair]) -> int:
        return len(low_level_dataset)

    def __len__(self) -> int:
        return max(len(self.indices), self.num_samples or 0)  # Megatron's samplers refuse an empty data set

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pair = self.pair(int(index))
        return self.made(pair["prompt"], pair["answer"])

    def pair(self, index: int) -> Pair:
        epoch, place = divmod(index, len(self.indices))
        if epoch != self._epoch:
            generator = np.random.default_rng([self.config.random_seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(self.indices)
        found: Pair = self.dataset[self._order[place]]
        return found

    def made(self, *texts: str) -> dict[str, torch.Tensor]:
        """The sample of a prompt and an answer."""
        tokenizer, length = self.config.tokenizer, self.config.sequence_length
        prompt, answer = (list(tokenizer.tokenize(text)) for text in texts)
        if answer[0] == getattr(tokenizer, "bos", None):  # Hugging Face tokenizers begin every text with it
            del answer[0]
        made = sample(prompt, answer, tokenizer.eod, length) | {"position_ids": torch.arange(length)}
        if self.config.create_attention_mask:  # True is what a token must not see
            made["attention_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)[None]
        return made


def main() -> None:
    """Check the flags, then hand over to Megatron's trainer."""
    args = pretrain_gpt.parse_args(REFUSED)
    if args.pretrained_checkpoint is None and args.load is None:
        sys.exit("finetune_gpt.py: give --pretrained-checkpoint (or --load and --finetune), a checkpoint to start from")
    pretrain_gpt.train(args, PairDataset)


if __name__ == "__main__":
    main()

"""One step of a Llama's way through Megatron and back, in a process group of its own; see test_finetune.py.

torchrun --standalone --nproc-per-node 2 -m tests.examples.check_hf_llama STEP FOLDER

make FOLDER                     a small Hugging Face model of random weights in FOLDER/hf.RANK
import FOLDER                   FOLDER/hf.RANK -> the Megatron checkpoint FOLDER/imported
export FOLDER SAVED             FOLDER/SAVED -> FOLDER/SAVED.hf
logits FOLDER SAVED HF          at TP=2, dense and tiled: FOLDER/SAVED gives the logits of transformers' FOLDER/HF
"""

import os
import sys
from pathlib import Path

import convert_hf_llama
import torch
from convert_hf_llama import Llama

from tests.support.harness import megatron

RANK = os.environ["RANK"]


def logits(folder: Path, saved: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_tiling import TilingConfig, tile

    latest = (folder / saved / "latest_checkpointed_iteration.txt").read_text()
    checkpoint = folder / saved / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    llama = Llama(folder / "hf")
    vocabulary, sequence = llama.vocab, llama.positions
    llama.vocab += llama.vocab % 2  # as Megatron pads it at TP=2
    tokens = torch.arange(2 * sequence).reshape(2, sequence) * 7 % vocabulary
    positions = torch.arange(sequence).expand(2, -1)
    mask = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)[None, None]
    with megatron(tensor_model_parallel_size=2), torch.no_grad():
        for kind in ("dense", "tiled"):
            model = llama.build(tensor_model_parallel_size=2, masked_softmax_fusion=False)
            if kind == "tiled":
                assert all(report.grid for report in tile(model, TilingConfig(factor=3, modules="all")))
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
            model.load_state_dict(state["model"])
            found = gather_from_tensor_model_parallel_region(model(tokens, positions, mask))
            if RANK == "0":
                torch.save((tokens, found[..., :vocabulary].clone()), folder / f"{saved}.{kind}.pt")


def main() -> None:
    step, folder, *names = sys.argv[1:5]
    place = Path(folder)
    if step == "import":
        print(convert_hf_llama.import_hf(place / "hf", place / "imported"))
    elif step == "export":
        print(convert_hf_llama.export_hf(place / "hf", place / names[0], place / f"{names[0]}.hf"))
    else:
        logits(place, names[0])


if __name__ == "__main__":
    main()

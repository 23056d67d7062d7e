"""One step of a Llama's way through Megatron and back, in a process group of its own; see test_finetune.py.

torchrun --standalone --nproc-per-node 2 tests/distributed/check_hf_llama.py STEP FOLDER

make FOLDER                     a small Hugging Face model of random weights in FOLDER/hf.RANK
import FOLDER                   FOLDER/hf.RANK -> the Megatron checkpoint FOLDER/imported
export FOLDER SAVED             FOLDER/SAVED -> FOLDER/SAVED.hf
logits FOLDER SAVED HF          at TP=2, dense and tiled: FOLDER/SAVED gives the logits of transformers' FOLDER/HF
"""

import os
import sys
from pathlib import Path

import torch
from harness import megatron, relative_error

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
import convert_hf_llama
from convert_hf_llama import Llama

RANK = os.environ["RANK"]
VOCABULARY, SEQUENCE = 123, 24


def make(folder: Path) -> None:
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=SEQUENCE,
        rms_norm_eps=1e-3,  # unlike both sides' defaults, as is the next
        rope_theta=500.0,
        initializer_range=0.2,
        tie_word_embeddings=folder.name == "tied",
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones would not tell them apart
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder / f"hf.{RANK}")


def logits(folder: Path, saved: str, hf: str) -> None:
    import transformers
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_tiling import TilingConfig, tile

    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(folder / hf)(tokens).logits
    latest = (folder / saved / "latest_checkpointed_iteration.txt").read_text()
    checkpoint = folder / saved / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    llama = Llama(folder / hf)
    llama.vocab += llama.vocab % 2  # as Megatron pads it at TP=2
    with megatron(tensor_model_parallel_size=2), torch.no_grad():
        for factor in (None, 3):
            model = llama.build(tensor_model_parallel_size=2, masked_softmax_fusion=False)
            if factor is not None:
                assert all(report.grid for report in tile(model, TilingConfig(factor=factor)))
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
            model.load_state_dict(state["model"])
            positions = torch.arange(SEQUENCE).expand(2, -1)
            mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
            found = gather_from_tensor_model_parallel_region(model(tokens, positions, mask))[..., :VOCABULARY]
            error = relative_error(found, expected)
            assert error < 2e-6, f"tile factor {factor}: relative error {error:.1e}"
            print(f"{saved}: logits of {hf}, tile factor {factor}: relative error {error:.1e}")


def main() -> None:
    step, folder, *names = sys.argv[1:5]
    place = Path(folder)
    if step == "make":
        make(place)
    elif step == "import":
        print(convert_hf_llama.import_hf(place / f"hf.{RANK}", place / "imported"))
    elif step == "export":
        print(convert_hf_llama.export_hf(place / f"hf.{RANK}", place / names[0], place / f"{names[0]}.hf"))
    else:
        logits(place, *names)


if __name__ == "__main__":
    main()

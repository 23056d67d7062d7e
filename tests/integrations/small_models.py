"""Small Hugging Face models on disk, random and alike in nothing: norms other than one, weights that matter."""

from pathlib import Path
from typing import Any

import torch

SEQUENCE, BATCH, WORDS = 8, 2, 64
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


def save(folder: Path, kind: str, tied: bool) -> str:
    """A model of ``kind`` (llama, qwen2, qwen3, qwen3_moe) in a folder of its own."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[kind]
    path = folder / f"{kind}{'-tied' if tied else ''}"
    more: dict[str, Any] = {} if kind == "qwen2" else {"head_dim": 8}
    more |= EXPERTS if kind == "qwen3_moe" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=tied, **more)
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.3) if "norm" in parameter_name else parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    return str(path)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, WORDS, (BATCH, SEQUENCE), generator=generator)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None],
        "labels": tokens.roll(-1, 1),
    }

r"""Fine-tune a Hugging Face model with Megatron-Bridge's `finetune` into a Hugging Face model, tiled.

    torchrun --standalone --nproc-per-node 2 examples/bridge/finetune.py --hf MODEL --save TUNED \
        --tile-factor 8 --tile-keep 0 --lora-rank 16

Without `--hf` a tiny Llama is made in TUNED-start. Without `--tile-factor` nothing is tiled. With `--lora-rank`
adapters are trained, and merged into what is saved. The data is Megatron's mock data: put your own in `recipe`. The
lines for tiles are those of `tile_provider`.
"""

import argparse
import os
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import config as settings
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step

from megatron_tiling import TilingConfig
from megatron_tiling.config import MODULES
from megatron_tiling.integrations.bridge import tile_provider


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, help="A folder with a Hugging Face model to start from.")
    parser.add_argument("--save", type=Path, required=True, help="Where the tuned Hugging Face model goes.")
    parser.add_argument("--tile-factor", type=int, help="Tiles of a layer.")
    parser.add_argument("--tile-keep", type=int, help="Tiles of an MLP kept for the backward pass.")
    parser.add_argument("--lora-rank", type=int, help="Train LoRA of this rank on all linear layers, nothing else.")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--optimizer", default="adam", choices=("adam", "sgd"))
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--float32", action="store_true", help="Instead of bf16.")
    parser.add_argument("--backend", default="nccl")
    options = parser.parse_args()
    if options.tile_keep is not None and options.tile_factor is None:
        parser.error(f"--tile-keep {options.tile_keep} does nothing without --tile-factor")
    return options


def tiny_llama(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {str(token): token for token in range(256)}
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}
    if int(os.environ["RANK"]) == 0:
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0"))).save_pretrained(folder)
    torch.distributed.barrier()
    return folder


def recipe(bridge: AutoBridge, hf: Path, options: argparse.Namespace) -> settings.ConfigContainer:
    """What a recipe of Megatron-Bridge returns, for this model."""
    world = torch.distributed.get_world_size()
    model = bridge.to_megatron_provider(load_weights=False)  # finetune() loads them
    model.tensor_model_parallel_size, model.sequence_parallel = world, world > 1
    model.seq_length = options.seq_length
    if options.float32:
        model.bf16, model.params_dtype, model.pipeline_dtype = False, torch.float32, torch.float32
    if options.tile_factor is not None:
        tiling = TilingConfig(options.tile_factor, MODULES, mlp_keep=options.tile_keep)
        tile_provider(model, tiling, native_loss=True)
    decay = {"start_weight_decay": 0.0, "end_weight_decay": 0.0, "weight_decay_incr_style": "constant"}
    return settings.ConfigContainer(
        model=model,
        train=settings.TrainingConfig(train_iters=options.iterations, global_batch_size=4, micro_batch_size=2),
        validation=settings.ValidationConfig(eval_iters=0, eval_interval=options.iterations),
        optimizer=settings.OptimizerConfig(optimizer=options.optimizer, lr=options.lr, min_lr=0.0, weight_decay=0.0),
        scheduler=settings.SchedulerConfig(lr_decay_style="cosine", lr_warmup_iters=0, **decay),
        ddp=settings.DistributedDataParallelConfig(check_for_nan_in_grad=True, grad_reduce_in_fp32=True),
        dataset=settings.MockGPTDatasetConfig(
            random_seed=1,
            seq_length=options.seq_length,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        logger=settings.LoggerConfig(log_interval=1),
        tokenizer=settings.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size - 1),
        checkpoint=settings.CheckpointConfig(pretrained_checkpoint=str(hf)),
        dist=settings.DistributedInitConfig(distributed_backend=options.backend),
        rng=settings.RNGConfig(seed=1),
        peft=LoRA(dim=options.lora_rank, alpha=2 * options.lora_rank) if options.lora_rank else None,
        mixed_precision=None if options.float32 else "bf16_mixed",
    )


class Export(Callback):
    """Saves the model that was trained as a Hugging Face model, adapters merged."""

    def __init__(self, bridge: AutoBridge, folder: Path) -> None:
        self.bridge, self.folder = bridge, folder

    def on_train_end(self, context: CallbackContext) -> None:
        self.bridge.save_hf_pretrained(context.model, self.folder, show_progress=False)


def main() -> None:
    options = flags()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(options.backend)
    hf = options.hf or tiny_llama(options.save.with_name(f"{options.save.name}-start"))
    bridge = AutoBridge.from_hf_pretrained(str(hf))
    finetune(recipe(bridge, hf, options), forward_step, callbacks=[Export(bridge, options.save)])


if __name__ == "__main__":
    main()

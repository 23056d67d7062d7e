"""``megatron_tiling.convert_deepspeed``: tile-keyed checkpoints of DeepSpeed's engine become Megatron's, and back.

torchrun --standalone --nproc-per-node 2 -m tests.check_convert_deepspeed FOLDER

Models at TP=2 whose linear layers are DeepSpeed's own ``TiledLinearReturnBias`` over Megatron's parallel layers are
saved by DeepSpeed's engine. Stock Megatron's ``load_checkpoint`` takes what they are converted to, and gives the same
logits; what its ``save_checkpoint`` writes is converted back, and loaded by DeepSpeed's engine.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.tiling import TiledLinearReturnBias
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.training import arguments, checkpointing, global_vars

from megatron_tiling import cpu
from megatron_tiling.convert_deepspeed import main as convert
from tests.support.harness import megatron, relative_error

VOCABULARY, SEQUENCE, ITERATION = 64, 12, 5
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "use_cpu_initialization": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "tensor_model_parallel_size": 2,
}
LLAMA: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
}
# Uneven tiles where DeepSpeed's forward takes them: the columns of column layers, the rows of row layers.
SPLITS = {"linear_qkv": (3, 4), "linear_proj": (2, 3), "linear_fc1": (5, 4), "linear_fc2": (4, 5)}
FLAGS = [f"{name.removeprefix('linear_')}={i}x{o}" for name, (i, o) in SPLITS.items()]
OLD_NAMES = {
    "decoder.layers": "language_model.encoder.layers",
    "decoder.final": "language_model.encoder.final",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def gpt(llama: bool, seed: int) -> GPTModel:
    torch.manual_seed(seed)
    config = TransformerConfig(**BASE | (LLAMA if llama else {}))
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    position = "rope" if llama else "learned_absolute"
    tied = not llama
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        SEQUENCE,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=position,
    )
    for parameter in model.parameters():  # biases and norms too: all of them count in the comparison
        parameter.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed + parameter.numel()))
    return model


def tile_as_deepspeed(model: GPTModel) -> None:
    """Megatron-LM 1.1.5's recipe: each parallel layer becomes a grid of parallel layers."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name not in SPLITS:
                continue
            column = isinstance(layer, ColumnParallelLinear)
            own = {"gather_output": False} if column else {"input_is_parallel": True}
            tiled = TiledLinearReturnBias(
                layer.input_size,
                layer.output_size,
                bias=layer.bias is not None,
                in_splits=SPLITS[name][0],
                out_splits=SPLITS[name][1],
                linear_cls=ColumnParallelLinear if column else RowParallelLinear,
                config=layer.config,
                init_method=torch.nn.init.normal_,
                skip_bias_add=layer.skip_bias_add,
                **own,
            )
            setattr(module, name, tiled)


def nested(state: dict[str, Any]) -> dict[str, Any]:
    """As Megatron-DeepSpeed's ``state_dict_for_save_checkpoint`` nests it."""
    encoder, embedding = {}, {}
    for key, value in state.items():
        for core, old in OLD_NAMES.items():
            key = key.replace(core, old)
        if key.startswith("embedding."):
            _, table, weight = key.split(".")
            embedding[table] = {weight: value}
        else:
            encoder[key.removeprefix("language_model.encoder.")] = value
    return {"language_model": {"embedding": embedding, "encoder": encoder}}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    with torch.no_grad():
        output: torch.Tensor = model(tokens, torch.arange(SEQUENCE).expand(2, -1), mask)
    return output


def trainer_args(llama: bool, **folders: Path) -> None:
    """Megatron's own arguments for the model, as its trainer would have them."""
    flags = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 40 --seq-length 12
        --max-position-embeddings 12 --micro-batch-size 1 --tensor-model-parallel-size 2 --transformer-impl local
        --no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion --lr 1 --train-iters 9
        --ckpt-format torch --no-load-optim --no-load-rng --no-save-optim --no-save-rng --mock-data
        --tokenizer-type NullTokenizer --vocab-size 63 --exit-on-missing-checkpoint --save-interval 1"""
    if llama:
        flags += " --swiglu --group-query-attention --num-query-groups 2 --position-embedding-type rope"
    sys.argv = ["check", *cpu.with_default_args(flags.split()), *(f"--{name}={path}" for name, path in folders.items())]
    args = arguments.validate_args(arguments.parse_args())
    args.padded_vocab_size, args.iteration = VOCABULARY, ITERATION
    global_vars.set_args(args)


def engine_of(model: torch.nn.Module) -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    groups = {  # the names that Megatron-DeepSpeed's mpu has
        f"get_{kind}_parallel_{what}": getattr(parallel_state, f"get_{own}_parallel_{what}")
        for kind, own in (("model", "tensor_model"), ("tensor_model", "tensor_model"), ("data", "data"))
        for what in ("group", "rank", "world_size")
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=SimpleNamespace(**groups))
    return engine


def on_rank_0(work: Callable[[], Any]) -> None:
    """Run on one rank while the others wait."""
    if torch.distributed.get_rank() == 0:
        assert work() == 0
    torch.distributed.barrier()


def check(llama: bool, folder: Path) -> None:
    """DeepSpeed -> stock -> DeepSpeed."""
    tiled = gpt(llama, seed=3)
    tile_as_deepspeed(tiled)
    wanted, saved_state = logits(tiled), {key: value.clone() for key, value in weights(tiled).items()}
    engine = engine_of(tiled)
    args = Namespace(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2 if llama else 4,
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, padded_vocab_size=VOCABULARY,
        use_rotary_position_embeddings=llama, add_position_embedding=not llama, consumed_train_samples=0,
        params_dtype=torch.float32,
    )  # fmt: skip
    if not llama:
        engine.module_state_dict = lambda **kwargs: nested(weights(tiled))
    client = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    engine.save_checkpoint(str(folder / "deepspeed"), tag=f"global_step{ITERATION}", client_state=client)

    on_rank_0(lambda: convert(["to-dense", str(folder / "deepspeed"), str(folder / "dense")]))
    trainer_args(llama, load=folder / "dense", save=folder / "stock")
    dense = gpt(llama, seed=4)
    iteration, _ = checkpointing.load_checkpoint([dense], None, None)
    assert iteration == ITERATION
    error = relative_error(logits(dense), wanted)
    assert error < 1e-6, error

    checkpointing.save_checkpoint(ITERATION, [dense], None, None, 0)
    names = ["--core-names"] if llama else []
    back = folder / "back"
    on_rank_0(lambda: convert(["to-tiled", str(folder / "stock"), str(back), "--tiled-linear-splits", *FLAGS, *names]))
    again = gpt(llama, seed=5)
    tile_as_deepspeed(again)
    if llama:
        engine_of(again).load_checkpoint(str(back), load_optimizer_states=False, load_lr_scheduler_states=False)
    else:
        file = back / f"global_step{ITERATION}" / f"mp_rank_{torch.distributed.get_rank():02d}_model_states.pt"
        loaded = torch.load(file, weights_only=False)["module"]
        expected = nested(saved_state)
        assert sorted(loaded) == sorted(expected)
        assert loaded["language_model"].keys() == expected["language_model"].keys()
        encoder, expected_encoder = loaded["language_model"]["encoder"], expected["language_model"]["encoder"]
        assert encoder.keys() == expected_encoder.keys(), set(encoder) ^ set(expected_encoder)
        assert all(torch.equal(encoder[key], value) for key, value in expected_encoder.items())
        return
    assert all(torch.equal(weights(again)[key], value) for key, value in saved_state.items())
    assert torch.equal(logits(again), wanted)


def main() -> None:
    folder = Path(sys.argv[1])
    cpu.install()
    with megatron(tensor_model_parallel_size=2):
        init_num_microbatches_calculator(0, None, 1, 1, 1)  # which stock's load_checkpoint sets forward
        for llama in (False, True):
            check(llama, folder / json.dumps(llama))
            if torch.distributed.get_rank() == 0:
                print(f"converted a {'Llama' if llama else 'GPT'} there and back", flush=True)


if __name__ == "__main__":
    main()

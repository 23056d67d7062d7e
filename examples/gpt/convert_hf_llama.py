"""Turn a Hugging Face Llama folder into a Megatron checkpoint, and a trained checkpoint back into such a folder.

    python examples/gpt/convert_hf_llama.py import --hf LLAMA_FOLDER --megatron CHECKPOINT
    python examples/gpt/convert_hf_llama.py export --hf LLAMA_FOLDER --megatron CHECKPOINT --output NEW_FOLDER

``import`` writes a torch_dist checkpoint, which a run of any tensor- and pipeline-parallel size loads, tiled or dense,
and the flags that describe the model to Megatron: printed, and in its model_flags.txt. ``export`` reads a checkpoint of
any such run; what is not weights (config.json, tokenizer) it takes from the folder that the weights came from. No GPU
is needed; the model has to fit into the machine's memory twice.

The two layouts differ in three places. Megatron's QKV weight holds, for each group of query heads, their rows and then
those of the group's one key and one value head. Its fc1 is the gate projection above the up projection. And with tied
embeddings neither has an output weight of its own. Rotary positions are the same: both rotate a head's two halves.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

FLAGS_FILE = "model_flags.txt"

#: What Megatron's --use-rope-scaling computes, apart from its factor.
ROPE_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


class ConversionError(Exception):
    """Something that the user can put right; its text says what."""


class Llama:
    """The sizes of a model, from its config.json.

    Raises:
        ConversionError: the folder has none, or this is not a Llama that Megatron can compute.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "config.json"
        if not path.is_file():
            raise ConversionError(f"{path}: no such file; --hf takes the folder of a Hugging Face model")
        config = json.loads(path.read_text())
        expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise ConversionError(f"{path}: {key} is {config[key]!r}, and only {value!r} is converted")
        self.layers: int = config["num_hidden_layers"]
        self.hidden: int = config["hidden_size"]
        self.ffn: int = config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.groups: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or self.hidden // self.heads
        self.vocab: int = config["vocab_size"]
        self.positions: int = config["max_position_embeddings"]
        self.epsilon: float = config["rms_norm_eps"]
        self.tied: bool = config.get("tie_word_embeddings", False)
        self.dtype: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000)
        self.rope_factor: float | None = None
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "llama3" and all(rope.get(key) == value for key, value in ROPE_SCALING.items()):
            self.rope_factor = rope["factor"]
        elif kind != "default":
            raise ConversionError(f"{path}: Megatron has no rotary scaling {rope}; llama3 with {ROPE_SCALING} it has")
        if self.theta != int(self.theta):
            raise ConversionError(f"{path}: rope_theta is {self.theta}, and Megatron's --rotary-base is a whole number")

    def flags(self) -> list[str]:
        """What describes this model to Megatron's trainer."""
        sizes = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "num-query-groups": self.groups,
            "kv-channels": self.head_dim,
            "max-position-embeddings": self.positions,
            "norm-epsilon": self.epsilon,
            "rotary-base": int(self.theta),
            "make-vocab-size-divisible-by": 1,  # padding would take part in the loss
        }
        flags = [f"--{name} {value}" for name, value in sizes.items()]
        flags += ["--group-query-attention --swiglu --disable-bias-linear --normalization RMSNorm"]
        flags += ["--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0"]
        if not self.tied:
            flags.append("--untie-embeddings-and-output-weights")
        if self.rope_factor is not None:
            flags.append(f"--use-rope-scaling --rope-scaling-factor {self.rope_factor}")
        return flags

    def single_names(self) -> dict[str, str]:
        """Megatron's name -> Hugging Face's, of the weights that are the same tensor in both."""
        names = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
        }
        if not self.tied:
            names["output_layer.weight"] = "lm_head.weight"
        for layer in range(self.layers):
            ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            names[f"{ours}input_layernorm.weight"] = f"{theirs}input_layernorm.weight"
            names[f"{ours}pre_mlp_layernorm.weight"] = f"{theirs}post_attention_layernorm.weight"
            names[f"{ours}self_attention.linear_proj.weight"] = f"{theirs}self_attn.o_proj.weight"
            names[f"{ours}mlp.linear_fc2.weight"] = f"{theirs}mlp.down_proj.weight"
        return names

    def to_megatron(self, theirs: State) -> State:
        """Hugging Face's tensors -> those of a ``GPTModel`` without parallelism."""
        ours = {name: theirs[their_name] for name, their_name in self.single_names().items()}
        for layer in range(self.layers):
            name, their_name = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            parts = (theirs[f"{their_name}self_attn.{part}_proj.weight"] for part in "qkv")
            grouped = [part.reshape(self.groups, -1, self.hidden) for part in parts]
            ours[f"{name}self_attention.linear_qkv.weight"] = torch.cat(grouped, dim=1).flatten(0, 1)
            halves = [theirs[f"{their_name}mlp.{half}_proj.weight"] for half in ("gate", "up")]
            ours[f"{name}mlp.linear_fc1.weight"] = torch.cat(halves)
        return ours

    def to_hf(self, ours: State) -> State:
        """The reverse of ``to_megatron``."""
        theirs = {their_name: ours[name] for name, their_name in self.single_names().items()}
        rows = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]
        for layer in range(self.layers):
            name, their_name = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            qkv = ours[f"{name}self_attention.linear_qkv.weight"].reshape(self.groups, sum(rows), self.hidden)
            for part, tensor in zip("qkv", qkv.split(rows, dim=1), strict=True):
                theirs[f"{their_name}self_attn.{part}_proj.weight"] = tensor.flatten(0, 1)
            for half, tensor in zip(("gate", "up"), ours[f"{name}mlp.linear_fc1.weight"].chunk(2), strict=True):
                theirs[f"{their_name}mlp.{half}_proj.weight"] = tensor
        return theirs

    def build(self, **options: Any) -> Any:
        """Megatron's model of these sizes, on the CPU; its weights are still to be set.

        Args:
            options: of ``TransformerConfig``, for a model with parallelism.
        """
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            kv_channels=self.head_dim,
            layernorm_epsilon=self.epsilon,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            params_dtype=self.dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            **options,
        )
        return GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=self.vocab,
            max_sequence_length=self.positions,
            position_embedding_type="rope",
            rotary_base=int(self.theta),
            share_embeddings_and_output_weights=self.tied,
        ).to(self.dtype)


def read_weights(folder: Path, llama: Llama, model: torch.nn.Module) -> State:
    """All tensors of a folder.

    Raises:
        ConversionError: some that the model needs are missing or of another shape, or there are some that it has not.
    """
    tensors: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if llama.tied:
        tensors.pop("lm_head.weight", None)
    empty = {name: weight.to("meta") for name, weight in model.named_parameters()}
    expected = {name: tuple(tensor.shape) for name, tensor in llama.to_hf(empty).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ConversionError(
            f"{folder}/*.safetensors: {name} is {found.get(name, 'missing')}, and by config.json it should be "
            f"{expected.get(name, 'absent')}"
        )
    return tensors


def start_megatron() -> None:
    """Process groups over gloo, without model parallelism; one process, or as many as torchrun started."""
    from megatron_tiling import cpu

    if not torch.cuda.is_available():
        cpu.install(train=False)
    from megatron.core import parallel_state

    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    parallel_state.initialize_model_parallel()


def import_hf(hf: Path, megatron: Path) -> str:
    """Write the checkpoint; returns the flags for Megatron."""
    tracker = megatron / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        raise ConversionError(f"{megatron} holds a checkpoint already; give another folder or remove it")
    llama = Llama(hf)
    start_megatron()
    from megatron.core import dist_checkpointing

    model = llama.build()
    state = llama.to_megatron(read_weights(hf, llama, model))
    model.load_state_dict(state, strict=False)  # besides weights, a module may have an empty "extra state"
    folder = megatron / "release"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "checkpoint_version": 3.0, "iteration": 0}, folder)
    flags = "\n".join(llama.flags())
    if dist.get_rank() == 0:
        (megatron / FLAGS_FILE).write_text(flags + "\n")
        tracker.write_text("release")  # last: a checkpoint is there only if all of it is
    return flags


def export_hf(hf: Path, megatron: Path, output: Path) -> str:
    """Write a Hugging Face folder with the newest weights of a checkpoint; returns a line that sums it up."""
    if output.exists() and any(output.iterdir()):
        raise ConversionError(f"--output {output}: is not empty")
    tracker = megatron / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise ConversionError(f"{tracker}: no such file; --megatron takes a folder that a run saved into")
    latest = tracker.read_text().strip()
    folder = megatron / (latest if latest == "release" else f"iter_{int(latest):07d}")
    llama = Llama(hf)
    start_megatron()
    from megatron.core import dist_checkpointing, parallel_state

    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        raise ConversionError(f"{folder}: not a torch_dist checkpoint; save with --ckpt-format torch_dist")
    model = llama.build()
    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata=metadata)
    _check_shapes(folder, llama, sharded)
    state = dist_checkpointing.load({"model": sharded}, folder)["model"]
    tensors = {name: tensor.detach().contiguous() for name, tensor in llama.to_hf(state).items()}
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        for file in hf.iterdir():
            if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pth", ".gguf"):
                shutil.copy(file, output)
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()
    return f"{output}: {len(tensors)} tensors of {folder}, {llama.dtype}"


def _check_shapes(folder: Path, llama: Llama, sharded: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    saved = dist_checkpointing.load_tensors_metadata(str(folder))
    for tensor in sharded.values():
        if not isinstance(tensor, ShardedTensor):
            continue  # fc1's gate and up, which are as wide as fc2 is
        found = saved.get(tensor.key)
        # Rows beyond the vocabulary are padding; fewer rows would be filled with zeros without a word.
        short = tensor.allow_shape_mismatch and found is not None and found.global_shape[0] >= llama.vocab
        if found is None or (found.global_shape != tensor.global_shape and not short):
            shape = "missing" if found is None else found.global_shape
            raise ConversionError(f"{folder}: {tensor.key} is {shape}, and for --hf it should be {tensor.global_shape}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("import", "export"):
        options = commands.add_parser(command)
        options.add_argument("--hf", type=Path, required=True, help="folder with config.json and *.safetensors")
        options.add_argument("--megatron", type=Path, required=True, help="checkpoint folder, as for --save")
        if command == "export":
            options.add_argument("--output", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    try:
        if args.command == "import":
            print(import_hf(args.hf, args.megatron))
        else:
            print(export_hf(args.hf, args.megatron, args.output))
    except ConversionError as error:
        sys.exit(f"convert_hf_llama.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

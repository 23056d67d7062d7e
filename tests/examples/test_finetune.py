"""Fine-tuning: from dense checkpoints and Hugging Face models, tiled, and back; frozen weights and adapters.

All of it is one torchrun of 2 processes, whose runs are forks: see distributed/train_many.py.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.launch import ROOT, TRAIN_MANY, torchrun
from tests.support.training import COMMON, LLAMA

EXAMPLES = ROOT / "examples" / "gpt"
SAVED_AT, ITERATIONS = 4, 8
DENSE = "--no-gradient-accumulation-fusion"
TILED = "--use-tiled-linear --tile-factor 3 --tiled-linear-modules all"
TP1, TP2 = "", "--tensor-model-parallel-size 2 --sequence-parallel"
KINDS = ("untied", "tied")
#: What the conversion prints and the other flags do not say.
HF_FLAGS = "--kv-channels 16 --norm-epsilon 0.001 --rotary-base 500 --make-vocab-size-divisible-by 1"
CHECK = ROOT / "tests" / "examples" / "check_hf_llama.py"
# The same batches and weights at every TP size; no dropout.
SETTINGS = (
    "--use-cpu-initialization --make-vocab-size-divisible-by 32 --hidden-dropout 0 --global-batch-size 4 "
    f"--train-iters {ITERATIONS} --lr 1e-2 --ckpt-format torch_dist --split 90,10,0"
)


def write_pairs(path: Path) -> None:
    """Prompts of 1 to 9 numbers, which are the null tokenizer's text, and answers that are soon learned."""
    pairs = [
        {
            "prompt": " ".join(str(7 * index % 100 + i) for i in range(1 + index % 9)),
            "answer": "3 5" + " 3 5" * (index % 3),
        }
        for index in range(50)
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))


def make_llama(folder: Path, tied: bool) -> None:
    """A small Hugging Face model of random weights; here, since transformers does not bear ``megatron_tiling.cpu``."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=123,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=24,
        rms_norm_eps=1e-3,  # unlike both sides' defaults, as is the next
        rope_theta=500.0,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones would not tell them apart
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; logs are NAME.log.RANK."""
    folder = tmp_path_factory.mktemp("finetune")
    write_pairs(folder / "pairs.jsonl")
    runs: list[dict[str, object]] = []

    def add(name: str, *argv: object) -> None:
        log = str(folder / f"{name.replace('/', '.')}.log")
        words = [str(argument) for argument in argv]
        runs.append({"name": name, "log": log, "argv": words})

    def train(name: str, script: str, *flags: str) -> None:
        common = [flag for flag in COMMON if flag != "--mock-data"]
        add(name, EXAMPLES / script, *common, *SETTINGS.split(), *" ".join(flags).split())

    def tune(name: str, *flags: str) -> None:
        train(name, "finetune_gpt.py", f"--data-path {folder}/pairs.jsonl", *flags)

    base = f"--pretrained-checkpoint {folder}/dense"
    train(
        "dense",
        "pretrain_gpt.py",
        LLAMA,
        DENSE,
        TP1,
        f"--mock-data --save {folder}/dense --save-interval 2 --exit-interval 2",
    )
    save = f"--load {folder}/tiled --save {folder}/tiled --save-interval {SAVED_AT}"
    tune("tiled", LLAMA, TILED, TP2, base, save)
    tune("dense at TP=2", LLAMA, DENSE, TP2, base)
    resume = f"--load {folder}/tiled --ckpt-step {SAVED_AT}"
    tune("dense at TP=1 goes on", LLAMA, DENSE, TP1, base, resume)
    for kind in KINDS:
        place = folder / kind
        model = f"{LLAMA.replace('--untie-embeddings-and-output-weights', '') if kind == 'tied' else LLAMA} "
        model += f"{HF_FLAGS} --vocab-size 123 {TILED} {TP2}"
        make_llama(place / "hf", tied=kind == "tied")
        add(f"{kind}/import", CHECK, "import", place)
        add(f"{kind}/logits", CHECK, "logits", place, "imported")
        add(f"{kind}/export", CHECK, "export", place, "imported")
        tune(
            f"{kind}/tune", model, f"--pretrained-checkpoint {place}/imported --save {place}/tuned --save-interval 100"
        )
        add(f"{kind}/export tuned", CHECK, "export", place, "tuned")
        add(f"{kind}/logits tuned", CHECK, "logits", place, "tuned")
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(TRAIN_MANY, folder / "runs.json", world=2)
    return folder


def log(folder: Path, name: str) -> str:
    return "".join((folder / f"{name.replace('/', '.')}.log.{rank}").read_text() for rank in range(2))


def losses(folder: Path, name: str) -> dict[int, float]:
    found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", log(folder, name))
    return {int(iteration): float(loss) for iteration, loss in found}


@pytest.mark.feature("fine-tuning from a dense checkpoint of another TP size")
def test_tiled_tuning_of_a_dense_checkpoint_equals_dense(folder: Path) -> None:
    tiled, dense = losses(folder, "tiled"), losses(folder, "dense at TP=2")
    assert list(tiled) == list(dense) == list(range(1, ITERATIONS + 1)), log(folder, "tiled")[-3000:]
    assert max(abs(tiled[i] - dense[i]) for i in dense) <= 2e-5
    assert dense[ITERATIONS] < dense[1] - 0.1, "it learns nothing"
    text = log(folder, "tiled")
    assert f"successfully loaded checkpoint from {folder}/dense" in text
    assert "megatron_tiling: tiled linear layers" in text


def test_dense_goes_on_from_tuned_checkpoint(folder: Path) -> None:
    tiled, resumed = losses(folder, "tiled"), losses(folder, "dense at TP=1 goes on")
    assert list(resumed) == list(range(SAVED_AT + 1, ITERATIONS + 1)), log(folder, "dense at TP=1 goes on")[-3000:]
    # The trainer logs the mean of two iterations as the second loss of a run.
    assert max(abs(tiled[i] - resumed[i]) for i in resumed if i != SAVED_AT + 2) <= 2e-5


@pytest.mark.feature("Hugging Face Llama to tiled training and back, {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_llama(kind: str, folder: Path) -> None:
    for saved, hf in (("imported", "hf"), ("tuned", "tuned.hf")):
        llama = transformers.LlamaForCausalLM.from_pretrained(folder / kind / hf)
        for layers in ("dense", "tiled"):
            tokens, found = torch.load(folder / kind / f"{saved}.{layers}.pt")
            with torch.no_grad():
                expected = llama(tokens).logits
            error = float((found - expected).norm() / expected.norm())
            assert error < 2e-6, f"{saved}, {layers}: relative error {error:.1e}"
    printed = log(folder, f"{kind}/import").split()
    assert set(HF_FLAGS.split()) | set(LLAMA.split()) - {"--untie-embeddings-and-output-weights"} <= set(printed)
    assert ("--untie-embeddings-and-output-weights" in printed) == (kind == "untied")
    original = load_file(folder / kind / "hf" / "model.safetensors")
    same = load_file(folder / kind / "imported.hf" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in same.items()} == {name: t.shape for name, t in original.items()}
    assert all(torch.equal(tensor, original[name]) for name, tensor in same.items())
    tuned = load_file(folder / kind / "tuned.hf" / "model.safetensors")
    assert not any(torch.equal(tensor, original[name]) for name, tensor in tuned.items())
    curve = losses(folder, f"{kind}/tune")
    assert curve[ITERATIONS] < curve[1] - 0.1


@pytest.mark.feature("frozen weights, LoRA")
def test_adapters_and_frozen_weights() -> None:
    output = torchrun(ROOT / "tests" / "examples" / "check_adapters.py", world=2)
    assert all(f"checks passed at TP={tp}" in output for tp in (1, 2))


def test_loss_mask() -> None:
    code = """
import finetune_gpt
def show(*pair):
    made = finetune_gpt.sample(*pair)
    print([made[key].tolist() for key in ("tokens", "labels", "loss_mask")])
show([1, 2, 3], [4, 5], 9, 7)
show([1, 2, 3, 4], [5, 6], 9, 4)
show([1, 2, 3], [4, 5, 6, 7, 8], 9, 4)
show([], [4, 5], 9, 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES)
    assert done.stdout.splitlines()[-4:] == [
        "[[1, 2, 3, 4, 5, 9, 9], [2, 3, 4, 5, 9, 9, 9], [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]",
        "[[3, 4, 5, 6], [4, 5, 6, 9], [0.0, 1.0, 1.0, 1.0]]",
        "[[3, 4, 5, 6], [4, 5, 6, 7], [1.0, 1.0, 1.0, 1.0]]",
        "[[4, 5, 9, 9], [5, 9, 9, 9], [1.0, 1.0, 0.0, 0.0]]",
    ], done.stderr[-3000:]

"""The runner from the outside: what a user's mistake gets, and that importing the package does nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import EXAMPLES, ROOT, TRAIN_MANY, torchrun
from tests.support.training import COMMON, SCRIPTS, losses

#: What is asked for -> words of the one line that answers.
MISTAKES = {
    "--use-tiled-linear --tile-factor 0": "--tile-factor 0: must be a whole number of at least 1",
    "--use-tiled-linear --tile-factor 2.5": "--tile-factor '2.5': must be a whole number of at least 1",
    "--use-tiled-linear --tiled-linear-storage disk": "--tiled-linear-storage 'disk': must be resident or",
    "--use-tiled-linear --tile-factor 49 --tiled-linear-modules all": "--tile-factor 49: decoder.layers.0.self_",
    "--use-tiled-linear --tiled-linear-splits fc1=1x81": "fc1=1x81: decoder.layers.0.mlp.linear_fc1",
    "--use-tiled-linear --tiled-linear-splits fc1:1x8": "--tiled-linear-splits fc1:1x8: write MODULE=INxOUT",
    "--use-tiled-linear --tiled-linear-splits gate=1x8": "unknown module 'gate'",
    "--use-tiled-linear --tiled-linear-modules fc3": "--tiled-linear-modules fc3: must be some of qkv",
    "--use-tiled-linear --tiled-linear-modules output --tiled-linear-storage partitioned": (
        "no layer of this model can be tiled (not in --tiled-linear-modules; tied to the embedding, whose weight"
    ),
    "--use-tiled-linear --tiled-linear-modules experts": (
        "no layer of this model can be tiled (not in --tiled-linear-modules); leave it out, or name other layers in "
    ),
    "--use-tiled-linear --tiled-mlp-keep 5": "--tiled-mlp-keep 5: must be within [0, 4]",
    "--use-tiled-linear --tiled-head-tokens 49": "--tiled-head-tokens 49: a micro-batch has 48 tokens",
    "--tile-factor 4": "--tile-factor does nothing without --use-tiled-linear",
    "--use-tiled-linear --transformer-impl transformer_engine": "use --transformer-impl local",
    "--use-tiled-linear --use-torch-fsdp2 --ckpt-format torch_dcp": "torch_dcp: tiles would show in the checkpoint",
    "--use-tiled-linear --use-torch-fsdp2 --num-experts 2 --save /nowhere": "--num-experts 2 with --save /nowhere: ",
    "--use-tiled-linear --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --load /nowhere": (
        "--use-megatron-fsdp with --load /nowhere: "
    ),
    "--use-tiled-linear --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward": "all tiles would stay gathered",
    "--use-tiled-linear --use-megatron-fsdp --data-parallel-sharding-strategy optim": "strategy optim: weights stay",
}
BY_SCRIPT = "--use-tiled-linear"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of a training run for each mistake, and of one that the script alone makes a tiled one."""
    folder = tmp_path_factory.mktemp("mistakes")
    script = [str(SCRIPTS / "pretrain_gpt.py"), "--train-iters", "2", "--global-batch-size", "2"]
    runs = [
        {
            "name": str(index),
            "log": str(folder / str(index)),
            "argv": [*script, *COMMON, *flags.split()],
            "runner": flags in MISTAKES,
        }
        for index, flags in enumerate([*MISTAKES, BY_SCRIPT])
    ]
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    output = torchrun(TRAIN_MANY, file, world=1)
    codes = dict(re.findall(r"^(\d+): exit (\d+)", output, re.M))
    return {
        flags: (int(codes[str(index)]), Path(folder, f"{index}.0").read_text())
        for index, flags in enumerate([*MISTAKES, BY_SCRIPT])
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_before_training_with_one_line(mistake: str, answers: dict[str, tuple[int, str]]) -> None:
    code, output = answers[mistake]
    assert code == 1
    lines = [line for line in output.splitlines() if line.startswith("megatron_tiling: ") and MISTAKES[mistake] in line]
    assert len(lines) == 1, output[-3000:]
    assert "Traceback" not in output and "lm loss" not in output


@pytest.mark.skipif(SCRIPTS != EXAMPLES, reason="no script of Megatron-LM's calls install()")
def test_a_script_may_call_install_below_its_imports(answers: dict[str, tuple[int, str]]) -> None:
    code, output = answers[BY_SCRIPT]
    assert code == 0 and len(losses(output)) == 2, output[-3000:]
    assert "megatron_tiling: tiled linear layers" in output and "GEMMs: 0\n" not in output
    assert "no GPU here" not in output, "the runner was not asked"


@pytest.mark.parametrize("failure", ["raise KeyError('of this rank')", "raise SystemExit('KeyError of this rank')"])
def test_a_rank_that_fails_says_so_and_leaves_without_its_peers(tmp_path: Path, failure: str) -> None:
    """The other rank never answers; torch's own way out would wait for the collective that has begun."""
    (tmp_path / "script.py").write_text(
        "import torch.distributed as d, torch\nwork = d.all_reduce(torch.ones(1), async_op=True)\n" + failure
    )
    group = f"'gloo', init_method='file://{tmp_path}/store', world_size=2"
    start = f"import torch\ntorch.distributed.init_process_group({group}, rank=%d)\n"
    peer = subprocess.Popen([sys.executable, "-c", start % 0 + "input()"], stdin=subprocess.PIPE)
    try:
        done = python(start % 1 + f"from megatron_tiling.runner import run\nrun('{tmp_path}/script.py')")
        assert peer.poll() is None, "it was waited for"
        assert done.returncode == 1 and "KeyError" in done.stderr and "of this rank" in done.stderr
        assert ("Traceback" in done.stderr) == ("SystemExit" not in failure)
    finally:
        peer.kill()
        peer.wait()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_import_loads_neither_megatron_nor_deepspeed_nor_apex() -> None:
    done = python(
        "import sys, megatron_tiling\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'megatron', 'deepspeed', 'apex'}))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_import_of_everything_patches_nothing() -> None:
    """Every module of the package that can be imported, then Megatron's functions are still Megatron's."""
    done = python(
        "import importlib, importlib.util, pkgutil, torch, megatron_tiling\n"
        "left_out = {'megatron_tiling.__main__'}\n"
        # Plugins of trainers: to import them is to use them.
        "left_out |= {f'megatron_tiling.integrations.{name}' for name in ('swift', 'verl')}\n"
        "if importlib.util.find_spec('transformer_engine') is None:\n"
        "    names = 'fp8', 'fp8_experts', 'fp8_loop', 'fp8_operands'\n"
        "    left_out |= {f'megatron_tiling.resident.{name}' for name in names}\n"
        "before = torch.zeros, torch.Tensor.to, torch.cuda.synchronize\n"
        "for module in pkgutil.walk_packages(megatron_tiling.__path__, 'megatron_tiling.'):\n"
        "    if module.name not in left_out and '.kernels.' not in module.name:\n"
        "        importlib.import_module(module.name)\n"
        "import megatron.training.arguments as a, megatron.training.training as t\n"
        "import megatron.core.transformer.torch_norm as n\n"
        "assert (torch.zeros, torch.Tensor.to, torch.cuda.synchronize) == before\n"
        "stock = [a.add_megatron_arguments, a.validate_args, t.get_model, n.WrappedTorchNorm.__new__]\n"
        "print({f.__module__.split('.')[0] for f in stock})\n"
    )
    assert done.stdout.strip().splitlines()[-1] == "{'megatron'}", done.stderr


def runner(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_tiling", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_usage() -> None:
    done = runner("--help")
    assert done.returncode == 0 and "python -m megatron_tiling [plan] SCRIPT" in done.stdout
    assert "--use-tiled-linear" in done.stdout
    assert runner().returncode == 2
    done = runner("--use-tiled-linear", "pretrain_gpt.py")
    assert done.returncode == 2 and "--use-tiled-linear stands before the script: first SCRIPT" in done.stderr
    done = runner("nowhere.py", "--use-tiled-linear")
    assert done.returncode == 2 and done.stderr.endswith("there is no script nowhere.py\n")


@pytest.mark.parametrize("before", [(), ("plan",)])
def test_what_is_no_python_script(before: tuple[str, ...]) -> None:
    done = runner(*before, "torchrun", "pretrain_gpt.py")
    assert done.returncode == 2 and "there is no script torchrun; give the Python script that it" in done.stderr
    done = runner(*before, "examples/gpt/train.sh")
    assert done.returncode == 2 and "examples/gpt/train.sh is not a Python script; give the" in done.stderr

"""ZeRO-3: the engine's configuration, and training with tensor parallelism (check_engine, the example)."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_tiling import zero3
from megatron_tiling.zero3 import config as zero3_config
from megatron_tiling.zero3.config import TileSizes
from megatron_tiling.zero3.engine import import_deepspeed
from tests.support.launch import EXAMPLES, ROOT, TRAIN_MANY, search_path, torchrun
from tests.support.training import COMMON, LLAMA

SIZES = TileSizes(smallest=1000, largest=2000, layer=8000)
NVME = os.environ.get("MEGATRON_TILING_NVME", "")
"""A folder for offloaded tensors. DeepSpeed compiles its async_io for it: needs libaio, and minutes the first time."""


def run_args(**options: Any) -> Namespace:
    batches = {"micro_batch_size": 2, "global_batch_size": 16}
    others = {"clip_grad": 1.0, "bf16": True, "fp16": False, "save": None, "load": "of_engine"}
    return Namespace(**(batches | others | options))


def config_file(folder: Path, **config: Any) -> Path:
    file = folder / "engine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | config))
    return file


def test_flags_complete_the_configuration(tmp_path: Path) -> None:
    file = config_file(tmp_path, gradient_clipping="auto", steps_per_print=7)
    config = zero3_config.engine_config(file, run_args(), data_parallel_size=4)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 16
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["steps_per_print"] == 7


def test_a_file_that_is_not_there_or_not_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^--deepspeed-config {file}: a JSON file is wanted"):
            zero3_config.engine_config(file, run_args(), data_parallel_size=4)
        file.write_text('{"zero_optimization": ')


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gradient_clipping": 0.5}, ("gradient_clipping is 0.5", "--clip-grad makes it 1.0")),
        ({"fp16": {"enabled": True}}, ("fp16: enabled is True", "--fp16 makes it False")),
        ({"zero_optimization": {"stage": 2}}, ("stage is 2", "stage 3 only")),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ("offload_param.device is nvme", "offload_param.nvme_path"),
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}},
            ("offload_optimizer.device is nvme", "--load of_engine", "zero3.load_dense"),
        ),
    ],
)
def test_a_contradiction_is_refused(config: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        zero3_config.engine_config(config_file(tmp_path, **config), run_args(), data_parallel_size=4)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_loss_scales_of_flag_and_file(tmp_path: Path) -> None:
    fp16 = {"bf16": False, "fp16": True, "initial_loss_scale": 1024, "loss_scale_window": 10}
    for given, in_file, wanted in (
        (None, {}, 0),
        (None, {"loss_scale": 8}, 8),
        (16, {}, 16),
        (16, {"loss_scale": 16}, 16),
    ):
        file = config_file(tmp_path, fp16=in_file)
        config = zero3_config.engine_config(file, run_args(**fp16, loss_scale=given), data_parallel_size=4)
        assert config["fp16"]["loss_scale"] == wanted
    file = config_file(tmp_path, fp16={"loss_scale": 8})
    with pytest.raises(ValueError, match="fp16: loss_scale is 8, but --loss-scale makes it 16"):
        zero3_config.engine_config(file, run_args(**fp16, loss_scale=16), data_parallel_size=4)


CHECK_ROWS = """
from argparse import ArgumentParser, Namespace
from megatron.training.arguments import add_megatron_arguments
from megatron_tiling.arguments import reasons_of_row
from pretrain_gpt_zero3 import REFUSED_HERE

options = add_megatron_arguments(ArgumentParser())._option_string_actions
for row in REFUSED_HERE:
    action = options[row.flag]
    assert not [*reasons_of_row(Namespace(**{action.dest: action.default}), row)], row
    value = True if action.nargs == 0 else "other" if action.type in (None, str) else 3
    (reason,) = reasons_of_row(Namespace(**{action.dest: value}), row)
    assert reason.startswith(row.flag), reason
"""


def test_what_the_examples_loop_does_not_follow() -> None:
    """In a process of its own: importing the example adds our flags to Megatron's."""
    environment = os.environ | {"PYTHONPATH": search_path(EXAMPLES)}
    subprocess.run([sys.executable, "-c", CHECK_ROWS], check=True, cwd=ROOT, env=environment)


def test_importing_the_configuration_imports_no_torch() -> None:
    script = "import sys, megatron_tiling.zero3.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert all(callable(getattr(zero3, name)) for name in zero3._LAZY)


def test_thresholds_follow_the_tile_unless_they_are_set() -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 5, "stage3_prefetch_bucket_size": "auto"}}
    zero = zero3_config.with_thresholds(config, SIZES)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == 2001
    assert zero["stage3_max_reuse_distance"] == 5
    assert zero["stage3_prefetch_bucket_size"] == 2000
    assert zero["stage3_param_persistence_threshold"] == 999
    assert zero3_config.pointless_settings({"zero_optimization": zero}, SIZES) == []
    assert "stage3_max_live_parameters" not in config["zero_optimization"]
    left = zero3_config.without_auto(config)["zero_optimization"]
    assert left == {"stage": 3, "stage3_max_reuse_distance": 5}
    on_disk = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    assert zero3_config.with_thresholds(on_disk, SIZES)["zero_optimization"]["stage3_prefetch_bucket_size"] == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"stage3_param_persistence_threshold": 1000}, "stage3_param_persistence_threshold 1000: tiles of 1000"),
        ({"stage3_max_reuse_distance": 2000}, "stage3_max_reuse_distance 2000: a tile has 2000"),
        ({"stage3_prefetch_bucket_size": 9000, "stage3_max_live_parameters": 9000}, "a whole layer has 8000"),
        ({"stage3_module_granularity_threshold": 1}, "stage3_module_granularity_threshold 1"),
        ({"leaf_module": {"classes": ["MLP"]}}, "leaf_module"),
    ],
)
def test_a_setting_that_keeps_layers_whole_is_named(setting: dict[str, Any], words: str) -> None:
    config = zero3_config.with_thresholds({"zero_optimization": {"stage": 3, **setting}}, SIZES)
    (reason,) = zero3_config.pointless_settings(config, SIZES)
    assert words in reason


@pytest.mark.feature("training: DeepSpeed ZeRO-3, TP=2, DP=2, tiles partitioned")
def test_training_with_tensor_parallelism_against_dense() -> None:
    output = torchrun(ROOT / "tests" / "zero3" / "check_engine.py", world=4)
    assert "FAILED" not in output and output.count("ok: ") >= 15, output[-3000:]


@functools.cache
def fp16_is_supported() -> bool:
    supported: bool = import_deepspeed().accelerator.get_accelerator().is_fp16_supported()
    return supported


def log_of(folder: Path, name: str) -> str:
    return "".join(Path(folder, f"{name}.{rank}").read_text() for rank in range(2))


def losses(folder: Path, name: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", log_of(folder, name))]


def validation_losses(folder: Path, name: str) -> dict[str, float]:
    """By where the line says that it was evaluated."""
    lines = re.findall(r"validation loss at (.*) \| lm loss value: ([0-9.E+-]+)", log_of(folder, name))
    return {place: float(loss) for place, loss in lines}


def with_zero(folder: Path, name: str, **zero: Any) -> Path:
    """The example's engine configuration with more settings of ``zero_optimization``."""
    config = json.loads((EXAMPLES / "zero3.json").read_text())
    config["zero_optimization"] |= zero
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    return file


def train(folder: Path, starts: dict[str, list[Any]], flags_of_rank_1: dict[str, list[str]]) -> None:
    """One training run on two ranks after the other; logs are ``folder/name.rank``."""
    plan: list[dict[str, Any]] = []
    for name, flags in starts.items():
        argv = list(map(str, flags))
        plan.append({"name": name, "log": str(folder / name), "argv": argv})
        if name in flags_of_rank_1:
            plan[-1]["argv_of_rank_1"] = argv + flags_of_rank_1[name]
    (folder / "runs.json").write_text(json.dumps(plan))
    torchrun(TRAIN_MANY, folder / "runs.json", world=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training runs at TP=2: dense on Megatron's trainer, and tiled on the engine, from and to each other's weights."""
    folder = tmp_path_factory.mktemp("zero3")
    offload = {"device": "cpu", "pin_memory": False}
    engine = with_zero(folder, "engine", offload_param=offload, offload_optimizer=offload)
    common = [*COMMON, "--tensor-model-parallel-size", "2", "--global-batch-size", "4", "--train-iters", "20"]
    dense = [EXAMPLES / "pretrain_gpt.py", *common, "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist"]
    tiled = [EXAMPLES / "pretrain_gpt_zero3.py", *common, "--use-tiled-linear", "--tile-factor", "3"]
    tiled += ["--deepspeed-config", engine]
    dense_engine = [EXAMPLES / "pretrain_gpt_zero3.py", *common, "--deepspeed-config", EXAMPLES / "zero3.json"]
    evaluating = ["--eval-interval", "5", "--eval-iters", "2", "--save-interval", "10"]
    starts = {
        "dense": [*dense, *evaluating, "--save", folder / "of_dense", "--no-save-optim"],
        "tiled": [
            *tiled,
            *evaluating,
            "--save",
            folder / "of_engine",
            "--save-interval",
            "10",
            "--exit-interval",
            "10",
        ],
        "resumed": [*tiled, *evaluating, "--load", folder / "of_engine", "--save-dense", folder / "of_tiled"],
        "dense_from_tiled": [*dense, "--load", folder / "of_tiled", "--finetune", "--exit-interval", "2"],
        "tiled_from_dense": [*tiled, "--load-dense", folder / "of_dense", "--exit-interval", "2"],
        "dense_engine": [*dense_engine, "--exit-interval", "3"],
    }
    for precision in ("bf16", "fp16") if fp16_is_supported() else ("bf16",):  # data parallel
        flags = [f"--{precision}", "--initial-loss-scale", "1024", "--tensor-model-parallel-size", "1"]
        flags += [*LLAMA.split(), "--exit-interval", "5"]
        starts[f"dense_{precision}"] = [*dense, *flags]
        starts[f"tiled_{precision}"] = [*tiled, *flags, "--deepspeed-config", EXAMPLES / "zero3.json"]
    starts["other_grid"] = [*tiled, "--load", folder / "of_engine", "--tile-factor", "6"]
    starts["other_tiles"] = [*tiled, "--global-batch-size", "6"]
    train(folder, starts, {"other_tiles": ["--tile-factor", "2"]})
    return folder


def test_the_example_trains_as_megatrons_trainer_does(runs: Path) -> None:
    expected, actual = losses(runs, "dense"), losses(runs, "tiled") + losses(runs, "resumed")
    assert len(expected) == len(actual) == 20
    # Megatron's trainer logs the mean of the first two iterations as the second loss.
    expected[1] = 2 * expected[1] - expected[0]
    assert actual == pytest.approx(expected, rel=2e-5)
    assert losses(runs, "dense_engine") == pytest.approx(expected[:3], rel=2e-5)


def test_the_example_evaluates_as_megatrons_trainer_does(runs: Path) -> None:
    expected = validation_losses(runs, "dense")
    actual = validation_losses(runs, "tiled") | validation_losses(runs, "resumed")
    places = [f"iteration {where}" for where in (5, 10, 15, 20, "20 on validation set", "20 on test set")]
    assert list(expected) == list(actual) == places
    assert actual == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_example_in_half_precision_and_data_parallel(precision: str, runs: Path) -> None:
    """The same initial weights, rotary frequencies and arithmetic, but for rounding."""
    if precision == "fp16" and not fp16_is_supported():
        pytest.skip("DeepSpeed has no fp16 on this device: get_accelerator().is_fp16_supported()")
    expected, actual = losses(runs, f"dense_{precision}"), losses(runs, f"tiled_{precision}")
    assert len(expected) == len(actual) == 5
    expected[1] = 2 * expected[1] - expected[0]
    assert actual == pytest.approx(expected, rel=6e-4)


@pytest.mark.feature("dense checkpoints into and out of ZeRO-3")
def test_dense_checkpoints_go_both_ways(runs: Path) -> None:
    """Weights that the engine saved, in a stock run, and a stock run's, in the engine."""
    from_tiled, from_dense = losses(runs, "dense_from_tiled"), losses(runs, "tiled_from_dense")
    from_tiled[1] = 2 * from_tiled[1] - from_tiled[0]
    assert len(from_dense) == 2 and from_dense == pytest.approx(from_tiled, rel=2e-5)
    assert from_dense[0] < losses(runs, "dense")[0] - 0.1


@pytest.mark.skipif(not NVME, reason="MEGATRON_TILING_NVME names no folder to offload to")
def test_offload_to_nvme(tmp_path: Path) -> None:
    """Parameters and optimizer on disk change no loss. DeepSpeed keeps shards of less than 1 MiB in memory."""
    flags = [EXAMPLES / "pretrain_gpt_zero3.py", *COMMON, "--use-tiled-linear", "--tile-factor", "2"]
    flags += ["--hidden-size", "512", "--ffn-hidden-size", "4096", "--tensor-model-parallel-size", "1"]
    flags += ["--global-batch-size", "4", "--train-iters", "4", "--deepspeed-config"]
    with tempfile.TemporaryDirectory(dir=NVME) as disk:
        optimizer = {"device": "nvme", "nvme_path": disk, "pin_memory": False}
        parameters = optimizer | {"max_in_cpu": 0, "buffer_size": 4_000_000}
        offload = with_zero(tmp_path, "offload", offload_param=parameters, offload_optimizer=optimizer)
        train(tmp_path, {"memory": [*flags, EXAMPLES / "zero3.json"], "disk": [*flags, offload]}, {})
        assert {file.parents[1].name for file in Path(disk).rglob("*.swp")} == {"float32params", "optimizer"}
    assert len(losses(tmp_path, "disk")) == 4 and losses(tmp_path, "disk") == losses(tmp_path, "memory")


def test_a_checkpoint_of_other_tiles_is_refused(runs: Path) -> None:
    """Flat partitions of 3 and of 6 tiles have the same sizes here: the engine would load them, permuted."""
    log = log_of(runs, "other_grid")
    lines = [line for line in log.splitlines() if "was saved with other tiles: " in line and "give --tile-fac" in line]
    assert len(lines) == 2 and "Traceback" not in log and "lm loss" not in log, log[-2000:]


def test_other_tiles_on_one_rank_end_every_rank_with_the_same_line(runs: Path) -> None:
    line = "megatron_tiling: --tile-factor: every rank must have the same value"
    assert all(line in Path(runs, f"other_tiles.{rank}").read_text() for rank in range(2))

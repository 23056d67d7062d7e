"""The version job: every supported megatron-core wheel, overlaid on this environment (no second torch).

Layers and models run against each wheel, and a short training run with the scripts of that version: out of the git
directory MEGATRON_LM_GIT if it is given, else this repository's example, which is written for 0.19. One start of
torchrun a version: Megatron is imported once, and what runs are forks.
"""

import importlib
import importlib.util
import inspect
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_tiling.trainer import versions
from tests.support.launch import ROOT, TRAIN_MANY, search_path, torchrun
from tests.support.megatron_lm import GIT, VERSIONS, Version, checkout, needs_megatron_lm, unpacked_wheel
from tests.support.training import COMMON, LLAMA, losses

ITERATIONS = 6
WORLD = 2
CHECKS = {"layers": "resident/check_layers.py", "models": "check_models.py"}
TRAINING = {
    "dense": "--no-gradient-accumulation-fusion",
    "tiled": "--use-tiled-linear --tile-factor 4 --tiled-linear-modules all",
    "spec": "--no-gradient-accumulation-fusion --spec megatron_tiling.spec tiled_layer_spec",
}


@dataclass
class Runs:
    """What one version's start of torchrun wrote: of itself, and of each run."""

    version: Version
    overlay: Path
    output: str
    logs: dict[str, str] = field(default_factory=dict)
    no_training: str = ""


def missing_imports(version: Version) -> list[str]:
    return [name for name in version.imports if importlib.util.find_spec(name) is None]


def scripts_of(version: Version, folder: Path) -> tuple[Path | None, str]:
    """A folder with pretrain_gpt.py for this version, and with what the wheel lacks, for 0.16 the trainer.

    Or none, and why.
    """
    if missing := missing_imports(version):
        return None, f"not run: the trainer of {version.tag} imports {', '.join(missing)}, which is not installed"
    if GIT is not None:
        return checkout(version.tag, folder, ":(glob)*.py", *version.folders), ""
    if version.tag != "core_v0.19.0":
        return None, "not run: the example is for 0.19, and MEGATRON_LM_GIT names no git directory of Megatron-LM"
    return ROOT / "examples" / "gpt", ""


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version.wheel)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    version: Version = request.param
    folder = tmp_path_factory.mktemp(version.wheel)
    overlay = unpacked_wheel(version, folder / "wheel")
    scripts, no_training = scripts_of(version, folder / "tree")
    commands = {name: [str(ROOT / "tests" / check)] for name, check in CHECKS.items()}
    flags = (
        f"--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 4 --train-iters {ITERATIONS} {LLAMA}"
    )
    if scripts is not None or not (version.folders or missing_imports(version)):  # the wheel's trainer is whole
        commands["install"] = [str(ROOT / "tests" / "trainer" / "check_install.py"), str(folder)]
    if scripts is not None:
        script = str(scripts / "pretrain_gpt.py")
        commands |= {kind: [script, *COMMON, *flags.split(), *extra.split()] for kind, extra in TRAINING.items()}
    plan = [
        {
            "name": name,
            "log": str(folder / name),
            "argv": argv,
            "check": name not in TRAINING,
        }
        for name, argv in commands.items()
    ]
    (folder / "runs.json").write_text(json.dumps(plan))
    path = {"PYTHONPATH": search_path(overlay, *([scripts] if scripts else []))}
    output = torchrun(TRAIN_MANY, folder / "runs.json", world=WORLD, environment=path)
    logs = {name: "".join(Path(folder, f"{name}.{rank}").read_text() for rank in range(WORLD)) for name in commands}
    yield Runs(version, overlay, output, logs, no_training)


def test_the_overlay_is_what_runs(runs: Runs) -> None:
    """A run against the version of the environment would prove nothing."""
    place = runs.overlay / "megatron" / "core" / "__init__.py"
    assert f"megatron-core {runs.version.wheel} of {place}\n" in runs.output


@pytest.mark.feature("layers, TP=2", version="{runs.wheel}")
def test_layers_equal_stock(runs: Runs) -> None:
    assert "cases passed at TP=2" in runs.logs["layers"], runs.logs["layers"][-6000:]
    assert "layers: exit 0\n" in runs.output


@pytest.mark.feature("whole models, TP=2", version="{runs.wheel}")
def test_models_equal_stock(runs: Runs) -> None:
    assert "model checks passed at TP=2" in runs.logs["models"], runs.logs["models"][-6000:]
    assert "models: exit 0\n" in runs.output


def test_install_keeps_stocks_names(runs: Runs) -> None:
    if "install" not in runs.logs:
        pytest.skip(runs.no_training)
    assert "install checks passed" in runs.logs["install"], runs.logs["install"][-6000:]
    assert "install: exit 0\n" in runs.output


@pytest.mark.feature("training with that version's scripts, by flag and by `--spec`", version="{runs.wheel}")
def test_training_equals_dense(runs: Runs) -> None:
    """Through the runner at TP=2, by flag and by spec."""
    if runs.no_training:
        pytest.skip(runs.no_training)
    logs = runs.logs
    expected = losses(logs["dense"])
    assert len(expected) == ITERATIONS, logs["dense"][-3000:]
    for kind in ("tiled", "spec"):
        found = losses(logs[kind])
        assert len(found) == ITERATIONS, logs[kind][-3000:]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2e-5, kind
        assert not re.search("GEMMs: 0$", logs[kind], re.M), f"{kind} ran no tile"
    assert logs["dense"].count("GEMMs: 0\n") == WORLD


def test_what_the_installed_version_has() -> None:
    assert versions.exists("megatron.core") and not versions.exists("megatron.nothing.of.this")
    ((module, name),) = versions.builders_of_configs()
    assert "pre_wrap_hook" in inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert versions.spec_may_be_a_function() and versions.torch_fsdp2_trains()
    assert not versions.uses_transformer_engine(Namespace(transformer_impl="local"))


@needs_megatron_lm  # only the whole version job: another start of torchrun
@pytest.mark.feature("models of TransformerEngine's specs, on stand-ins for its layers", version="{runs.wheel}")
def test_transformer_engine_specs(runs: Runs) -> None:
    path = {"PYTHONPATH": search_path(ROOT / "tests" / "stand_ins", runs.overlay)}
    output = torchrun(ROOT / "tests" / "resident" / "check_transformer_engine.py", world=2, environment=path)
    assert all(f"TransformerEngine checks passed at TP={size}" in output for size in (1, 2)), output[-6000:]

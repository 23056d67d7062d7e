"""The version job: every supported megatron-core wheel, overlaid on this environment (no second torch).

Layers and models run against each wheel, and a short training run with the scripts of that version: out of the git
directory MEGATRON_LM_GIT if it is given, else this repository's example, which is written for 0.19. Wheels are kept
in MEGATRON_TILING_WHEELS, by default .whl/ of the checkout.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import ROOT, torchrun
from megatron_lm import GIT, checkout
from test_training import COMMON, LLAMA, free_port, losses

WHEELS = Path(os.environ.get("MEGATRON_TILING_WHEELS", ROOT / ".whl"))
ITERATIONS = 6
DISTRIBUTED = ROOT / "tests" / "distributed"


@dataclass(frozen=True)
class Version:
    """A wheel, the tag whose scripts go with it, what these need of the tag's tree besides, and what they import."""

    wheel: str
    tag: str
    folders: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


VERSIONS = (
    Version("0.16.1", "core_v0.16.1", ("megatron", ":(exclude)megatron/core"), ("regex", "six")),
    Version("0.17.1", "core_v0.17.1", ("megatron/legacy",)),
    Version("0.18.2", "core_v0.18.2", imports=("yaml",)),
    Version("0.19.2", "core_v0.19.0"),
)


def download(version: str) -> Path:
    """The wheel of this Python version, from the cache or the index."""
    pattern = f"megatron_core-{version}-*.whl"
    if not list(WHEELS.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, f"megatron-core=={version}", "-d", WHEELS], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"megatron-core {version} is not to be had: {done.stderr.strip().splitlines()[-1]}")
    return next(WHEELS.glob(pattern))


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version.wheel)
def version(request: pytest.FixtureRequest) -> Version:
    chosen: Version = request.param
    return chosen


@pytest.fixture(scope="module")
def overlay(version: Version, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp(f"megatron-core-{version.wheel}")
    with zipfile.ZipFile(download(version.wheel)) as wheel:
        wheel.extractall(folder)
    return folder


def search_path(*folders: Path) -> dict[str, str]:
    given = filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT, *given)))}


def test_the_overlay_is_what_runs(version: Version, overlay: Path) -> None:
    """A run against the version of the environment would prove nothing."""
    code = "import megatron.core; print(megatron.core.__file__, megatron.core.__version__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | search_path(overlay),
    )
    assert done.stdout.split() == [str(overlay / "megatron" / "core" / "__init__.py"), version.wheel], done.stderr


def test_layers_equal_stock(version: Version, overlay: Path) -> None:
    output = torchrun(DISTRIBUTED / "check_layers.py", world=2, environment=search_path(overlay))
    assert "cases passed at TP=2" in output


def test_models_equal_stock(version: Version, overlay: Path) -> None:
    output = torchrun(DISTRIBUTED / "check_models.py", world=1, environment=search_path(overlay))
    assert "model checks passed at TP=1" in output


def scripts_of(version: Version, folder: Path) -> Path:
    """A folder with pretrain_gpt.py for this version, and with what the wheel lacks, for 0.16 the trainer."""
    if missing := [name for name in version.imports if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not run: the trainer of {version.tag} imports {', '.join(missing)}, which is not installed")
    if GIT is not None:
        return checkout(version.tag, folder, ":(glob)*.py", *version.folders)
    if version.tag != "core_v0.19.0":
        pytest.skip("not run: the example is for 0.19, and MEGATRON_LM_GIT names no git directory of Megatron-LM")
    return ROOT / "examples" / "gpt"


def test_training_equals_dense(version: Version, overlay: Path, tmp_path: Path) -> None:
    """Through the runner at TP=2, by flag and by spec."""
    scripts = scripts_of(version, tmp_path / "tree")
    flags = (
        f"--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 4 --train-iters {ITERATIONS} {LLAMA}"
    )
    kinds = {
        "dense": "--no-gradient-accumulation-fusion",
        "tiled": "--use-tiled-linear",
        "spec": "--no-gradient-accumulation-fusion --spec megatron_tiling.spec tiled_layer_spec",
    }
    runs = [
        {
            "name": kind,
            "port": free_port(),
            "log": str(tmp_path / kind),
            "argv": [str(scripts / "pretrain_gpt.py"), *COMMON, *flags.split(), *extra.split()],
        }
        for kind, extra in kinds.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    torchrun(DISTRIBUTED / "train_many.py", tmp_path / "runs.json", world=2, environment=search_path(overlay, scripts))
    logs = {kind: "".join(Path(tmp_path, f"{kind}.{rank}").read_text() for rank in (0, 1)) for kind in kinds}
    expected = losses(logs["dense"])
    assert len(expected) == ITERATIONS, logs["dense"][-3000:]
    for kind in ("tiled", "spec"):
        found = losses(logs[kind])
        assert len(found) == ITERATIONS, logs[kind][-3000:]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2e-5, kind
        assert "GEMMs: 0\n" not in logs[kind], f"{kind} ran no tile"
    assert logs["dense"].count("GEMMs: 0\n") == 2

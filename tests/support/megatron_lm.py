"""The Megatron-LM versions that are supported, for tests: wheels of megatron-core, and trees of the tags.

Wheels are kept in MEGATRON_TILING_WHEELS, by default .whl/ of the checkout. Trees come out of the git directory that
MEGATRON_LM_GIT names.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT

GIT = os.environ.get("MEGATRON_LM_GIT")
WHEELS = Path(os.environ.get("MEGATRON_TILING_WHEELS", ROOT / ".whl"))
needs_megatron_lm = pytest.mark.skipif(GIT is None, reason="MEGATRON_LM_GIT names no git directory of Megatron-LM")
DATASETS = Path("megatron", "core", "datasets")


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


def unpacked_wheel(version: Version, folder: Path) -> Path:
    """megatron-core of that version for this Python, from the cache or the index, in ``folder``."""
    pattern = f"megatron_core-{version.wheel}-*.whl"
    if not list(WHEELS.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, f"megatron-core=={version.wheel}", "-d", WHEELS], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"megatron-core {version.wheel} is not to be had: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(WHEELS.glob(pattern))) as wheel:
        wheel.extractall(folder)
    return folder


def checkout(tag: str, folder: Path, *paths: str) -> Path:
    """The tag's tree, or only the ``paths`` of it, in a new folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(GIT), "archive", tag, *paths], capture_output=True, check=True)
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def use_built_dataset_helpers(tree: Path, wheel: Path) -> None:
    """Give a tree the C++ dataset helpers of an unpacked wheel, and as there no Makefile: they take pybind11."""
    (helpers,) = (wheel / DATASETS).glob("helpers_cpp*.so")
    shutil.copy(helpers, tree / DATASETS)
    (tree / DATASETS / "Makefile").unlink()

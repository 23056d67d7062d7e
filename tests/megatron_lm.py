"""Trees of Megatron-LM's tags, for tests: out of the git directory that MEGATRON_LM_GIT names."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

GIT = os.environ.get("MEGATRON_LM_GIT")
needs_megatron_lm = pytest.mark.skipif(GIT is None, reason="MEGATRON_LM_GIT names no git directory of Megatron-LM")
DATASETS = Path("megatron", "core", "datasets")


def checkout(tag: str, folder: Path, *paths: str) -> Path:
    """The tag's tree, or only the ``paths`` of it, in a new folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(GIT), "archive", tag, *paths], capture_output=True, check=True)
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def use_built_dataset_helpers(tree: Path) -> None:
    """Give a tree the C++ dataset helpers of the installed wheel, and as there no Makefile: they take pybind11."""
    helpers = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    assert helpers is not None and helpers.origin is not None
    shutil.copy(helpers.origin, tree / DATASETS)
    (tree / DATASETS / "Makefile").unlink()

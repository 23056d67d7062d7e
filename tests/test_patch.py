"""Patching Megatron-LM trees: stand-ins, and with MEGATRON_LM_GIT=GITDIR the real tags, which then also train."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tiling import patch
from megatron_tiling.patch import Patch, Refused, blob_hash, known_patches, parse, read_version, run
from tests.support.launch import ROOT, TRAIN_MANY, search_path, torchrun
from tests.support.megatron_lm import (
    VERSIONS,
    Version,
    checkout,
    needs_megatron_lm,
    unpacked_wheel,
    use_built_dataset_helpers,
)
from tests.support.training import COMMON, ITERATIONS, losses

SCRIPT = b"import torch\n\nfrom builders import build\n\nprint(build)\n"
ADDED = b"import plugin\n\nplugin.install()\n"
PATCHED = b"import torch\n\n" + ADDED + b"from builders import build\n\nprint(build)\n"


def diff(before: bytes = SCRIPT, after: bytes = PATCHED, added: bytes = ADDED) -> bytes:
    body = b"".join(b"+" + line for line in added.splitlines(keepends=True))
    index = f"index {blob_hash(before)}..{blob_hash(after)} 100644\n".encode()
    return index + b"--- a/x\n+++ b/x\n@@ -2,0 +3,%d @@\n" % added.count(b"\n") + body


def make_tree(folder: Path, script: bytes = SCRIPT, version: tuple[int, int, int] | None = (0, 18, 2)) -> Path:
    (folder / "megatron" / "core").mkdir(parents=True)
    if version:
        lines = [f"{name} = {number}" for name, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)]
        (folder / patch.VERSION_FILE).write_text("\n".join(lines) + "\n")
    (folder / patch.SCRIPT).write_bytes(script)
    (folder / patch.SCRIPT).chmod(0o754)
    return folder


def snapshot(tree: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in tree.rglob("*") if file.is_file())
    return {str(file.relative_to(tree)): (file.read_bytes(), file.stat().st_mode) for file in files}


@pytest.fixture
def patches() -> list[Patch]:
    return [parse("core_v0.17.1", diff(b"another\n", b"another, patched\n")), parse("core_v0.18.2", diff())]


def test_patch_and_undo_are_exact_and_idempotent(tmp_path: Path, patches: list[Patch]) -> None:
    tree = make_tree(tmp_path)
    stock = snapshot(tree)
    assert "can be patched (core_v0.18.2)" in run(tree, patches, check=True)
    assert snapshot(tree) == stock
    assert "patched (core_v0.18.2)" in run(tree, patches)
    assert (tree / patch.SCRIPT).read_bytes() == PATCHED
    patched = snapshot(tree)
    assert "patched already (core_v0.18.2)" in run(tree, patches)
    assert "can be restored" in run(tree, patches, undo=True, check=True)
    assert snapshot(tree) == patched
    assert "restored (core_v0.18.2)" in run(tree, patches, undo=True)
    assert snapshot(tree) == stock
    assert "is not patched" in run(tree, patches, undo=True)
    assert snapshot(tree) == stock


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize(
    ("script", "version", "words"),
    [
        (SCRIPT + b"# mine\n", (0, 18, 2), "not the one of core_v0.18.2: it has local changes"),
        (PATCHED + b"# mine\n", (0, 18, 2), "has the plugin's lines, and was changed besides"),
        (b"future\n", (0, 21, 0), "is Megatron-LM 0.21.0, and the nearest supported tag is core_v0.18.2"),
        (b"past\n", (0, 9, 3), "is Megatron-LM 0.9.3, and the nearest supported tag is core_v0.17.1"),
        (b"something else\n", None, "not a Megatron-LM tree that is known"),
    ],
)
def test_an_unknown_script_is_refused_and_left_alone(
    tmp_path: Path, patches: list[Patch], script: bytes, version: tuple[int, int, int] | None, words: str, undo: bool
) -> None:
    tree = make_tree(tmp_path, script, version)
    stock = snapshot(tree)
    with pytest.raises(Refused) as refusal:
        run(tree, patches, undo)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert snapshot(tree) == stock


def test_a_folder_without_the_script_is_refused(tmp_path: Path, patches: list[Patch]) -> None:
    with pytest.raises(Refused, match="it has no pretrain_gpt"):
        run(tmp_path, patches)


def test_nothing_is_half_applied(tmp_path: Path, patches: list[Patch], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a kill, before the new file is in place."""
    tree = make_tree(tmp_path)
    stock = snapshot(tree)

    def interrupted(*paths: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="no space left"):
        run(tree, patches)
    assert snapshot(tree) == stock


def test_a_patch_that_breaks_its_promise_is_not_written(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    with pytest.raises(Refused, match="does not lead to the file that it promises"):
        run(tree, [parse("core_v0.18.2", diff(after=b"other"))])
    assert (tree / patch.SCRIPT).read_bytes() == SCRIPT


@pytest.mark.parametrize(
    "text",
    [
        diff().replace(b"+import plugin", b" import plugin"),
        diff().replace(b"+import plugin", b"-import plugin"),
        diff().replace(b"@@ -2,0 +3,3 @@", b"@@ -2,0 +3,4 @@"),
        diff().replace(blob_hash(SCRIPT).encode(), blob_hash(SCRIPT)[:7].encode()),
        diff() + b"@@ -4,0 +8,1 @@\n+more\n",
        b"",
    ],
)
def test_a_diff_with_context_two_places_or_short_hashes_is_no_patch(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"core_v0\.18\.2\.patch"):
        parse("core_v0.18.2", text)


def test_the_patches_that_come_with_the_package() -> None:
    patches = known_patches()
    assert [patch.tag for patch in patches] == ["core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0"]
    assert len({patch.before for patch in patches} | {patch.after for patch in patches}) == 8
    for known in patches:
        assert b"megatron_tiling.install()" in known.added


def command(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tiling.patch", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


def test_command_line(tmp_path: Path) -> None:
    code, output = command(make_tree(tmp_path, version=(0, 20, 0)))
    assert code == 1
    assert output.startswith("megatron_tiling.patch: ") and output.count("\n") == 1 and "core_v0.19.0" in output
    assert command()[0] == 2
    code, output = command("--help")
    assert code == 0 and "--undo" in output and "core_v0.16.1" in output


def test_command_loads_no_torch() -> None:
    code = "import sys, megatron_tiling.patch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@needs_megatron_lm
@pytest.mark.parametrize("known", known_patches(), ids=lambda patch: patch.tag)
def test_real_tag(known: Patch, tmp_path: Path) -> None:
    tree = checkout(known.tag, tmp_path / "tree", patch.SCRIPT, str(patch.VERSION_FILE))
    assert read_version(tree)[:2] == known.version[:2]
    stock = snapshot(tree)
    assert command(tree)[0] == 0 and command(tree)[0] == 0
    assert blob_hash((tree / patch.SCRIPT).read_bytes()) == known.after
    compile((tree / patch.SCRIPT).read_bytes(), "script", "exec")
    assert command(tree, "--undo")[0] == 0 and command(tree, "--undo")[0] == 0
    assert snapshot(tree) == stock
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    file = next(folder for folder in patch.PATCH_FOLDERS if folder.is_dir()) / f"{known.tag}.patch"
    subprocess.run(["git", "apply", "--unidiff-zero", str(file)], cwd=tree, check=True)
    assert blob_hash((tree / patch.SCRIPT).read_bytes()) == known.after


@needs_megatron_lm
@pytest.mark.feature("training of a patched tree", version="{version.wheel}")
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.tag)
def test_a_patched_tree_trains_without_the_runner(version: Version, tmp_path: Path) -> None:
    """From the tag's tree alone but for the C++ dataset helpers, TP=2: the loss of tiled equals dense.

    Taking the patch out again leaves the tree as it was, byte for byte.
    """
    if missing := [name for name in version.imports if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the trainer of {version.tag} imports {', '.join(missing)}, which is not installed")
    tree = checkout(version.tag, tmp_path / "tree")
    use_built_dataset_helpers(tree, unpacked_wheel(version, tmp_path / "wheel"))
    stock = snapshot(tree)
    assert command(tree)[0] == 0
    flags = [*COMMON, *"--tensor-model-parallel-size 2 --global-batch-size 4 --train-iters".split(), str(ITERATIONS)]
    kinds = {"dense": "--no-gradient-accumulation-fusion", "tiled": "--use-tiled-linear"}
    runs = [
        {
            "name": kind,
            "log": str(tmp_path / kind),
            "argv": [str(tree / patch.SCRIPT), *flags, flag],
            "runner": False,
        }
        for kind, flag in kinds.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    environment = {"PYTHONPATH": search_path(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    output = torchrun(TRAIN_MANY, tmp_path / "runs.json", world=2, environment=environment)
    assert f" of {tree}/megatron/core/" in output
    dense, tiled = ("".join(Path(f"{tmp_path / kind}.{rank}").read_text() for rank in (0, 1)) for kind in kinds)
    assert len(losses(dense)) == len(losses(tiled)) == ITERATIONS, tiled[-3000:]
    assert max(abs(a - b) for a, b in zip(losses(dense), losses(tiled), strict=True)) <= 2e-5
    assert not re.search("GEMMs: 0$", tiled, re.M) and dense.count("GEMMs: 0\n") == 2
    assert command(tree, "--undo")[0] == 0
    assert snapshot(tree) == stock

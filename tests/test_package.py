"""The package as a whole: imports point down its rooms, and a wheel holds all of it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.launch import ROOT

PACKAGE = "megatron_tiling"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a wheel is built from, in another folder."""
    for folder in (PACKAGE, "patches"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> tuple[int, str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    return done.returncode, done.stdout + done.stderr


def test_imports_point_down(copy: Path) -> None:
    code, output = lint_imports(copy)
    assert code == 0, output


def test_an_upward_import_breaks_the_contract(copy: Path) -> None:
    with (copy / PACKAGE / "tiles" / "grid.py").open("a") as file:
        file.write(f"\nfrom {PACKAGE}.trainer import hook\n")
    code, output = lint_imports(copy)
    assert code == 1 and f"{PACKAGE}.tiles.grid -> {PACKAGE}.trainer.hook" in output


def test_a_module_without_a_room_breaks_the_contract(copy: Path) -> None:
    (copy / PACKAGE / "attic.py").touch()
    code, output = lint_imports(copy)
    assert code == 1 and "attic" in output


def test_a_wheel_holds_the_whole_package(copy: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels"],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "wheels").glob("*.whl")
    held = {entry for entry in zipfile.ZipFile(wheel).namelist() if entry.startswith(f"{PACKAGE}/")}
    ours = {f"{PACKAGE}/{file.relative_to(ROOT / PACKAGE)}" for file in (ROOT / PACKAGE).rglob("*.py")}
    patches = {f"{PACKAGE}/patches/{file.name}" for file in (ROOT / "patches").iterdir() if file.is_file()}
    assert held == ours | patches | {f"{PACKAGE}/py.typed"}

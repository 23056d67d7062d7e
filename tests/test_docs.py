"""The documentation: its links lead somewhere, its commands and flags exist, its examples give what they say."""

import doctest
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_tiling.plan.options import command_parser
from tests.support.launch import EXAMPLES, ROOT, search_path

RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(
    page
    for folder in (".", ".github", "benchmarks", "docs", "examples", "patches", "tests")
    for page in (ROOT.glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)
#: Dated results hold commands as they were.
COMMANDED = [page for page in PAGES if RESULTS not in page.parents]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*\b")
#: Of torchrun, pytest, pip, git and trainers, where a page speaks of these.
FLAGS_OF_OTHERS = {"--standalone", "--nproc-per-node", "--no-deps", "--custom-model-provider-path"}
FLAGS_OF_OTHERS |= set(command_parser()._option_string_actions)  # of the planner
FLAGS_OF_OTHERS |= {"--output-logit-dtype", "--megatron-fsdp-version"}  # of Megatron-LM's main branch


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them out of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_page_of_docs_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


def modules_with_examples() -> list[str]:
    files = [
        file for file in (ROOT / "megatron_tiling").rglob("*.py") if re.search(r"^\s*>>> ", file.read_text(), re.M)
    ]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


#: What is before a command in a block: indentation and settings; then how the programs begin.
COMMAND = re.compile(r"\s*(?:[A-Z_]+=(?:\S+|\".*?\") )*(?=python|torchrun|pip|tools/|examples/|\.venv/bin/)(.*)")


def commands(page: Path) -> list[list[str]]:
    """The words of each command in a page's blocks, without comments."""
    blocks = re.findall(r"^(?: {4}.+\n)+|^```\n(?:.*\n)*?```$", page.read_text(), re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(found[1], comments=True) for found in map(COMMAND.match, lines) if found]


COMMANDS = [(page, command) for page in COMMANDED for command in commands(page)]

#: Prints the flags of Megatron with ours, and what --help of each module says. One process: imports take seconds.
ASK = """
import argparse, contextlib, io, json, runpy, sys
from megatron.training.arguments import add_megatron_arguments
from megatron_tiling.arguments import add_tiling_args
parser = add_tiling_args(add_megatron_arguments(argparse.ArgumentParser()))
answers = {"megatron": " ".join(parser._option_string_actions)}
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(program, run_name="__main__")
    answers[program] = out.getvalue()
print(json.dumps(answers))
"""


def program(command: list[str]) -> str:
    """What a command runs: a module, or a file of the checkout."""
    script = next((word for word in command if word.endswith((".py", ".sh"))), command[0])
    module = command[command.index("-m") + 1] if "-m" in command else "megatron_tiling"
    return script if module == "megatron_tiling" else module


def under_megatron(command: list[str]) -> bool:
    """Whether Megatron's trainer reads a script's flags."""
    return "megatron_tiling" in command or program(command) == "pretrain_gpt.py"


def given(command: list[str]) -> set[str]:
    return set(FLAG.findall(" ".join(command))) - FLAGS_OF_OTHERS


@cache
def flags() -> dict[str, set[str]]:
    """Of Megatron with ours, and of each module that a page gives flags to."""
    asked = {program(command) for _, command in COMMANDS if given(command)}
    asked = {name for name in asked if name.startswith(("benchmarks.", "megatron_tiling."))}
    environment = os.environ | {"PYTHONPATH": search_path(), "CUDA_VISIBLE_DEVICES": ""}
    ask = [sys.executable, "-c", ASK, *asked]
    done = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(answers.values()), [name for name, answer in answers.items() if not answer]
    return {name: set(FLAG.findall(answer)) for name, answer in answers.items()}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: name(value) if value in PAGES else "")
def test_a_command_exists(page: Path, command: list[str]) -> None:
    """Its program is there, and knows the flags that it is given."""
    target = program(command)
    if target.endswith(".py"):
        script = ROOT / target if "/" in target else EXAMPLES / target  # pretrain_gpt.py, any tree's
        known = set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
        assert given(command) <= known | (flags()["megatron"] if under_megatron(command) else set())
    elif target.endswith(".sh"):
        assert os.access(ROOT / target, os.X_OK)
        assert given(command) <= flags()["megatron"]
    elif re.fullmatch(r"\w+\.\w+", target):
        assert importlib.util.find_spec(target)
        assert given(command) <= flags().get(target, set())


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=name)
def test_flags_that_a_page_names_exist(page: Path) -> None:
    known = set().union(*flags().values(), FLAGS_OF_OTHERS)
    assert set(FLAG.findall(page.read_text())) <= known

"""Add the plugin to a Megatron-LM tree's own pretrain_gpt.py, or take it out again.

    python -m megatron_tiling.patch TREE [--undo] [--check]

Each file of patches/ is a diff of additions without context for one Megatron-LM tag. Such a diff is right for one
very file only, so its `index` line carries that file's git blob hash, and the hash of the result: a file with another
hash is refused, and what is written has the promised hash or is not written. Needs neither git nor torch.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPT = "pretrain_gpt.py"
VERSION_FILE = Path("megatron", "core", "package_info.py")
#: Next to this file where the package is installed, next to the package in a checkout.
PATCH_FOLDERS = (Path(__file__).parent / "patches", Path(__file__).parents[1] / "patches")

Version = tuple[int, ...]


class Refused(Exception):
    """The tree is not one that a patch fits; the message says why. Nothing was changed."""


@dataclass(frozen=True)
class Patch:
    """Lines to insert into one known file.

    Attributes:
        tag: the Megatron-LM tag, ``core_v0.19.0``.
        before, after: git blob hashes of the script without and with the lines.
        position: how many lines precede them.
        added: the lines.
    """

    tag: str
    before: str
    after: str
    position: int
    added: bytes

    @property
    def version(self) -> Version:
        return tuple(map(int, re.findall(r"\d+", self.tag)))

    def apply(self, script: bytes) -> bytes:
        """The script with the lines."""
        lines = script.splitlines(keepends=True)
        lines.insert(self.position, self.added)
        return b"".join(lines)

    def undo(self, script: bytes) -> bytes:
        """The script without the lines, given the one with them."""
        lines = script.splitlines(keepends=True)
        del lines[self.position : self.position + self.added.count(b"\n")]
        return b"".join(lines)


def blob_hash(content: bytes) -> str:
    """What ``git hash-object`` prints.

    >>> blob_hash(b"")
    'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def parse(tag: str, text: bytes) -> Patch:
    """A patch file's content.

    Raises:
        ValueError: it does not add lines to the script in one place, and no more.
    """
    head, *hunk = re.split(rb"^@@ -(\d+),0 \+\d+,(\d+) @@\n", text, flags=re.MULTILINE)
    hashes = re.search(rb"^index ([0-9a-f]{40})\.\.([0-9a-f]{40}) ", head, re.MULTILINE)
    if hashes is None or len(hunk) != 3:
        raise ValueError(f"{tag}.patch: no full blob hashes, or not one place without context")
    position, count, body = hunk
    lines = body.splitlines(keepends=True)
    if len(lines) != int(count) or not all(line.startswith(b"+") and line.endswith(b"\n") for line in lines):
        raise ValueError(f"{tag}.patch: not a diff of additions")
    return Patch(tag, hashes[1].decode(), hashes[2].decode(), int(position), b"".join(line[1:] for line in lines))


def known_patches() -> list[Patch]:
    """Those that come with this package, oldest tag first."""
    folder = next((folder for folder in PATCH_FOLDERS if folder.is_dir()), PATCH_FOLDERS[0])
    patches = [parse(file.stem, file.read_bytes()) for file in folder.glob("*.patch")]
    if not patches:
        raise FileNotFoundError(f"no patches in {folder}: this installation of megatron_tiling is not whole")
    return sorted(patches, key=lambda patch: patch.version)


def run(tree: Path, patches: list[Patch], undo: bool = False, check: bool = False) -> str:
    """Patch the tree's script, or take the patch out; with ``check`` only say what would be done.

    Returns:
        What was done, in one line.

    Raises:
        Refused: the script is none that the patches know.
    """
    script = (tree / SCRIPT).resolve()
    if not script.is_file():
        raise Refused(f"{tree} is not a Megatron-LM tree: it has no {SCRIPT}")
    content = script.read_bytes()
    found = blob_hash(content)
    for patch in patches:
        wanted = patch.before if undo else patch.after
        if found not in (patch.before, patch.after):
            continue
        if found == wanted:
            return f"{script} is {'not patched' if undo else 'patched already'} ({patch.tag}); nothing to do"
        changed = patch.undo(content) if undo else patch.apply(content)
        if blob_hash(changed) != wanted:
            raise Refused(f"{patch.tag}.patch does not lead to the file that it promises; {script} is left as it is")
        if not check:
            _replace(script, changed)
        return f"{script} {'can be ' if check else ''}{'restored' if undo else 'patched'} ({patch.tag})"
    raise Refused(_why_unknown(tree, script, content, patches))


def _why_unknown(tree: Path, script: Path, content: bytes, patches: list[Patch]) -> str:
    if any(patch.added in content for patch in patches):
        return f"{script} has the plugin's lines, and was changed besides: edit it by hand"
    version = read_version(tree)
    if version is None:
        return f"{tree} is not a Megatron-LM tree that is known: it has no version in {VERSION_FILE}"
    nearest = min(patches, key=lambda patch: [abs(a - b) for a, b in zip(version, patch.version, strict=True)])
    name = ".".join(map(str, version))
    way_out = f"run it unpatched, `python -m megatron_tiling {script}`"
    if version[:2] == nearest.version[:2]:
        return f"{script} is not the one of {nearest.tag}: it has local changes, or is of another revision; {way_out}"
    return f"{tree} is Megatron-LM {name}, and the nearest supported tag is {nearest.tag}: check that out, or {way_out}"


def read_version(tree: Path) -> Version | None:
    """``(major, minor, patch)`` of the tree's megatron-core, read without importing it."""
    try:
        text = (tree / VERSION_FILE).read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)", text, re.MULTILINE))
    return tuple(int(numbers[part]) for part in ("MAJOR", "MINOR", "PATCH")) if len(numbers) == 3 else None


def _replace(script: Path, content: bytes) -> None:
    """All of the new content or all of the old one, whenever this is interrupted."""
    handle, temporary = tempfile.mkstemp(dir=script.parent, prefix=f".{script.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(script, temporary)
        os.replace(temporary, script)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, or nothing to do; 1 refused, nothing changed; 2 misused."""
    patches = known_patches()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tiling.patch",
        description=f"Add megatron_tiling to {SCRIPT} of a Megatron-LM tree: {', '.join(p.tag for p in patches)}.",
    )
    parser.add_argument("tree", type=Path, metavar="TREE", help="the folder of a Megatron-LM checkout")
    parser.add_argument("--undo", action="store_true", help="take the patch out again")
    parser.add_argument("--check", action="store_true", help="only say what would be done")
    options = parser.parse_args(arguments)
    try:
        print(f"megatron_tiling.patch: {run(options.tree, patches, options.undo, options.check)}")
    except (Refused, OSError) as error:
        print(f"megatron_tiling.patch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

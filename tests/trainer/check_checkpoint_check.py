"""A checkpoint that cannot be loaded ends a tiled training run with one line, and is left as it is.

torchrun --standalone --nproc-per-node 2 -m tests.trainer.check_checkpoint_check FOLDER

Two runs of the stock trainer save, as ``torch_dist`` and in the legacy format. Each case spoils a copy, or asks for
another model, and starts a run that is to load it.
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_tiling import cpu
from megatron_tiling.convert_deepspeed import convert
from megatron_tiling.tiles import deepspeed_keys as tile_keys
from tests.support.train_many import train
from tests.trainer.test_checkpoints import TWO_RANKS, Run, arguments

LEGACY = Run("TP=2", "factor 3", storage="legacy")
SAVED = {"torch_dist": TWO_RANKS, "legacy": LEGACY}
SPLITS = {"qkv": (1, 2), "proj": (2, 1), "fc1": (1, 4), "fc2": (4, 1)}
RANK = int(os.environ.get("RANK", "0"))
RANK_1 = "mp_rank_01/model_optim_rng.pt"


@dataclass(frozen=True)
class Case:
    """What is done to a copy of a saved checkpoint, and the words of the line that a run which loads it ends in."""

    name: str
    source: str
    words: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda folder: None
    flags: str = ""


def cut(pattern: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = sorted(folder.glob(pattern))[-1]
        os.truncate(file, file.stat().st_size // 2)

    return spoil


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: sorted(folder.glob(pattern))[-1].unlink()


def endless_iteration(folder: Path) -> None:
    """An error of the file system's, which rank 0 alone meets: the name of that iteration's folder is too long."""
    (folder / "latest_checkpointed_iteration.txt").write_text("9" * 300)


def old_common_part(folder: Path) -> None:
    """Before 0.19 some of a checkpoint was in this file, and where it is, it counts."""
    (folder / "iter_0000003" / "common.pt").write_bytes(b"PK")


def tile_keyed(folder: Path) -> None:
    for file in folder.glob("*/*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["model"] = tile_keys.split_tiles(tile_keys.flatten(content["model"]), SPLITS, 2)
        torch.save(content, file)


def of_deepspeed(folder: Path) -> None:
    converted = folder.with_name("converted")
    convert(folder, converted, SPLITS, core=True)
    shutil.rmtree(folder)
    converted.rename(folder)


def without_optimizer(folder: Path) -> None:
    for file in folder.glob("*/*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        del content["optimizer"]
        torch.save(content, file)


WIDER = "--hidden-size 64"
CASES = [
    Case("other hidden size", "torch_dist", ("iter_0000003 is of another model", "48]", "64]"), flags=WIDER),
    Case("cut shard", "torch_dist", (".distcp is cut off", "iter_0000003"), cut("iter_0000003/*.distcp")),
    Case("lost shard", "torch_dist", (".distcp is missing", "iter_0000003"), remove("iter_0000003/*.distcp")),
    Case("cut metadata", "torch_dist", ("iter_0000003/.metadata cannot be read",), cut("iter_0000003/.metadata")),
    Case("cut common part", "torch_dist", ("iter_0000003/common.pt cannot be read",), old_common_part),
    Case("lost format", "torch_dist", ("iter_0000003/metadata.json is missing",), remove("iter_0000003/metadata.json")),
    Case("empty tracker", "torch_dist", ("latest_checkpointed_iteration.txt should hold",), cut("latest*")),
    Case("endless iteration", "torch_dist", ("cannot be looked at, OSError", "File name too long"), endless_iteration),
    Case("no such step", "torch_dist", ("there is no", "iter_0000009"), flags="--ckpt-step 9"),
    Case(
        "no pre-trained one",
        "torch_dist",
        ("--pretrained-checkpoint /nowhere: there is no latest_checkpointed_iteration.txt in it, nor in --load /",),
        remove("latest*"),
        "--pretrained-checkpoint /nowhere",
    ),
    Case("legacy, other hidden size", "legacy", ("mp_rank_00/model_optim_rng.pt is of another model",), flags=WIDER),
    Case("legacy, cut file", "legacy", (f"{RANK_1} cannot be read",), cut(f"iter_0000003/{RANK_1}")),
    Case("legacy, lost file", "legacy", (f"{RANK_1} is missing",), remove(f"iter_0000003/{RANK_1}")),
    Case("tile keys", "legacy", ("mp_rank_00/model_optim_rng.pt has tile keys", "to-dense"), tile_keyed),
    Case("DeepSpeed's", "legacy", ("model_states.pt is a checkpoint of DeepSpeed", "to-dense"), of_deepspeed),
    Case("an error of stock's", "legacy", (), without_optimizer),
]


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for(file: Path) -> Path:
    while not file.exists():
        time.sleep(0.01)
    return file


def run(flags: list[str], folder: Path, number: int) -> int:
    """Exit code of a training run in a child of this rank, which logs to ``number.log.RANK``."""
    child = os.fork()
    if child == 0:
        train({"name": str(number), "log": f"{folder / str(number)}.log", "argv": flags}, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def verify(case: Case, log: str) -> None:
    """Log of both ranks."""
    lines = [line for line in log.splitlines() if line.startswith("megatron_tiling: ") and "linear layers" not in line]
    assert "lm loss" not in log, log[-3000:]
    if not case.words:
        assert "Traceback" in log and "KeyError: 'optimizer'" in log, log[-3000:]
        return
    found = [line for line in lines if all(word in line for word in case.words)]
    assert len(found) == 1 and "Traceback" not in log, log[-3000:]


def main() -> None:
    folder = Path(sys.argv[1])
    cpu.install()  # imports Megatron's trainer, once
    torch.set_num_threads(1)
    filesystem_async.get_write_results_queue("fork")
    for number, source in enumerate(SAVED.values()):
        assert run([*arguments(source, folder), "--exit-interval", "3"], folder, number) == 0
    before: dict[Case, dict[str, str]] = {}
    for number, case in enumerate(CASES, len(SAVED)):
        place, flags = folder / f"case{number}", arguments(SAVED[case.source], folder)
        if RANK == 0:
            shutil.copytree(folder / SAVED[case.source].name, place)
            case.spoil(place)
            before[case] = contents(place)
        flags = [
            *flags[: flags.index("--save")],
            "--load",
            str(place),
            "--save",
            str(place),
            "--save-interval",
            "9",
            *case.flags.split(),
        ]
        code = run(flags, folder, number)
        assert code == 1, f"{case.name}: exit code {code}"
    (folder / f"finished.{RANK}").touch()
    if RANK == 0:
        wait_for(folder / "finished.1")
        for number, case in enumerate(CASES, len(SAVED)):
            verify(case, "".join((folder / f"{number}.log.{rank}").read_text() for rank in (0, 1)))
            assert contents(folder / f"case{number}") == before[case], case.name
        print(f"{len(CASES)} bad checkpoints refused")


if __name__ == "__main__":
    main()

"""Run Megatron-LM's own unit tests of layers, models and checkpoints, stock and tiled, and compare.

    python tests/upstream/megatron_unit_tests.py [--checkout MEGATRON_LM] [--world 8] [--factor 3] [--gpus] [FILE ...]

Takes the tests of a core_v0.19.0 checkout, by default out of the git directory that MEGATRON_LM_GIT names, and runs
all or some files of them twice with the installed megatron-core: with stock layers, and with every linear layer, MLP
and LM head replaced by a tiled one. A test that passes with stock layers on every rank must pass with tiled ones.

With ``--gpus`` the tests run on TransformerEngine, one GPU a rank, as they are but for ``GPU_EDITS``: no download of
data, unfused attention, which every machine has, and no equal bits of GEMMs that differ in height. Ranks share GPUs
where those are fewer, with gloo for NCCL, which is enough for checkpoints. Without, on a CPU: gloo for NCCL,
``megatron_tiling.cpu`` for a GPU, local specs for TransformerEngine's, longer timeouts, and ``EDITS``.
What cannot run there fails or is skipped in both runs, and the table at the end says why.
"""

import argparse
import collections
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TAG = "core_v0.19.0"
FILES = (
    "tests/unit_tests/tensor_parallel",
    "tests/unit_tests/transformer/test_mlp.py",
    "tests/unit_tests/transformer/test_attention.py",
    "tests/unit_tests/transformer/test_transformer_layer.py",
    "tests/unit_tests/models/test_gpt_model.py",
    "tests/unit_tests/dist_checkpointing/models/test_mlp_glu.py",
    "tests/unit_tests/dist_checkpointing/models/test_gpt_model.py",
)
#: File, pattern, replacement, and how often it occurs.
NO_DOWNLOAD = (
    ("tests/unit_tests/conftest.py", r"from tests\.test_utils.*download_and_extract_asset\n", "", 1),
    ("tests/unit_tests/conftest.py", r", autouse=True(?=\)\ndef ensure_test_data)", "", 1),
)
GLOO = (
    ("tests/unit_tests/test_utilities.py", r"backend='nccl'", "backend='gloo'", 1),
    ("tests/unit_tests/test_utilities.py", r"timedelta\(minutes=1\)", "timedelta(minutes=20)", 2),
)
UNFUSED_ATTENTION = {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"}
GPU_EDITS = (
    *NO_DOWNLOAD,
    ("tests/unit_tests/test_utilities.py", r"os\.environ\.pop\('NVTE_\w+', None\)", "pass", 12),
    ("tests/unit_tests/models/test_gpt_model.py", r"os\.environ\.pop\('NVTE_\w+', None\)", "pass", 12),
    (  # cuBLAS takes another kernel for a chunk of tokens than for all of them
        "tests/unit_tests/transformer/test_transformer_layer.py",
        r"assert torch\.equal\((outputs\[1\]\[0\], outputs\[4\]\[0\])\)",
        r"torch.testing.assert_close(\1)",
        2,
    ),
)
EDITS = (
    *NO_DOWNLOAD,
    *GLOO,
    ("tests/unit_tests/transformer/test_mlp.py", r"device\.type == 'cuda'", "device.type == 'cpu'", 2),
    (  # one generator is the CPU's and the GPU's here: the seed that is to count comes last
        "tests/unit_tests/tensor_parallel/test_initialization.py",
        r"(torch\.manual_seed\(42\))\n( +)(model_parallel_cuda_manual_seed\(4[12]\).*)",
        r"\3\n\2\1",
        10,
    ),
    (
        "tests/unit_tests/transformer/test_attention.py",
        r"apply_rope_fusion=apply_rope_fusion",
        "apply_rope_fusion=False",
        1,
    ),
    (
        "tests/unit_tests/models/test_gpt_model.py",
        r"from transformer_engine.pytorch.fp8 import check_fp8_support",
        "check_fp8_support = lambda: (False, 'no TransformerEngine')",
        1,
    ),
)
PYTEST = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")


def adapted(checkout: Path, folder: Path, edits: tuple[tuple[str, str, str, int], ...]) -> None:
    """Copy the checkout's tests into ``folder`` and edit them."""
    (folder / "tests").mkdir()
    for name in ("__init__.py", "unit_tests", "test_utils"):
        subprocess.run(["cp", "-r", str(checkout / "tests" / name), str(folder / "tests")], check=True)
    for name, pattern, replacement, wanted in edits:
        path = folder / name
        text, found = re.subn(pattern, replacement, path.read_text())
        if found != wanted:
            raise SystemExit(f"not the file this script knows: {name} has {found} times {pattern}")
        path.write_text(text)


# --- in each rank ---------------------------------------------------------------------------------------------------


class Outcomes:
    """Pytest plugin: the outcome of each test, with the reason of a skip or a failure."""

    def __init__(self, factor: int | None, gpus: bool) -> None:
        self.factor = factor
        self.gpus = gpus
        self.found: dict[str, tuple[str, str]] = {}
        self.made: collections.Counter[str] = collections.Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.factor:  # now that the tests are imported: they know the classes by name
            use_tiled_layers(self.factor, self.made)
        for item in [] if self.gpus else items:
            for mark in item.own_markers + (item.parent.own_markers if item.parent else []):
                if mark.name == "skipif" and re.search("cuda|gpu", mark.kwargs.get("reason", ""), re.I):
                    object.__setattr__(mark, "args", (False,))  # the CPU stands for the GPU

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found[report.nodeid] = ("failed", str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, reason = report.outcome, ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        if report.when == "call" or outcome != "passed":
            self.found[report.nodeid] = (outcome, reason)
            if outcome == "failed":
                print(f"rank {os.environ['RANK']}: {report.nodeid}: {reason}", file=sys.__stderr__, flush=True)


def use_no_flash_attention() -> None:
    """Megatron's question for its version fails where it is missing, and tests ask when they are imported."""
    from megatron.core import utils

    utils.is_fa_min_version = lambda *version, **options: False


def use_unfused_attention() -> None:
    """Where a test says nothing else: by the environment, and by Megatron's config, which has to agree with it."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    os.environ |= UNFUSED_ATTENTION
    for config in (TransformerConfig, MLATransformerConfig):
        config.__init__ = functools.partialmethod(config.__init__, attention_backend=AttnBackend.unfused)


def use_local_specs() -> None:
    """TransformerEngine's specs become the local ones, whatever options they are asked for."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    def local(stock: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(stock).parameters

        @functools.wraps(stock)
        def build(*args: Any, **kwargs: Any) -> Any:
            return stock(*args, **{name: value for name, value in kwargs.items() if name in known})

        return build

    specs.get_gpt_layer_with_transformer_engine_spec = local(specs.get_gpt_layer_local_spec)
    specs.get_gpt_layer_with_transformer_engine_submodules = local(specs.get_gpt_layer_local_submodules)


def destroy_groups_too() -> None:
    """Upstream leaves each test's process groups behind: with gloo, that is hundreds of threads a rank."""
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    stock = parallel_state.destroy_model_parallel

    def destroy() -> None:
        stock()
        for group in list(distributed_c10d._world.pg_map):
            if group is not distributed_c10d.GroupMember.WORLD:
                distributed_c10d.destroy_process_group(group)

    parallel_state.destroy_model_parallel = destroy


def use_tiled_layers(factor: int, made: collections.Counter[str]) -> None:
    """Every module of megatron-core and of the tests that knows the stock classes is given the tiled ones."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP

    from megatron_tiling import TiledColumnParallelLinear, TiledRowParallelLinear, TilingConfig
    from megatron_tiling.resident.layers import shard_shape
    from megatron_tiling.resident.lm_head import convert_head
    from megatron_tiling.resident.mlp import convert_mlp
    from megatron_tiling.resident.transformer_engine import TILED_CLASSES

    def clipped(tiled: Any) -> Any:
        """A tiled class whose layers have ``factor`` tiles, or as many as they have features for."""

        class Clipped(tiled):
            def set_tiles(self, in_splits: int, out_splits: int, **options: Any) -> None:
                rows, columns = shard_shape(self)
                if tiled.input_is_already_split:
                    in_splits = min(factor, columns)
                else:
                    out_splits = min(factor, rows // 2 or 1)
                super().set_tiles(in_splits, out_splits, **options)
                made[f"{tiled.__name__}: {in_splits}x{out_splits} tiles"] += 1

        return Clipped

    column = clipped(TiledColumnParallelLinear)
    replacements: dict[Any, Any] = {ColumnParallelLinear: column, RowParallelLinear: clipped(TiledRowParallelLinear)}
    replacements |= {stock: clipped(tiled) for stock, tiled in TILED_CLASSES.items()}
    owners = {stock.__module__ for stock in replacements}
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core", "tests.")) and name not in owners:
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type) and value in replacements:
                    setattr(module, attribute, replacements[value])

    def then(cls: Any, convert: Callable[[Any], str]) -> None:
        build = cls.__init__

        @functools.wraps(build)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            build(self, *args, **kwargs)
            made[f"{cls.__name__}: {convert(self) or 'tiled'}"] += 1

        cls.__init__ = init

    def head(model: Any) -> str:
        layer = getattr(model, "output_layer", None)
        if type(layer) is column:
            layer.__class__ = TiledColumnParallelLinear  # convert_head takes the package's classes only
        return convert_head(model, TilingConfig())

    then(MLP, lambda mlp: convert_mlp(mlp, None))
    then(GPTModel, head)


def over_gloo(options: argparse.Namespace) -> bool:
    """NCCL wants a GPU for each rank."""
    import torch

    return not options.gpus or options.world > torch.cuda.device_count()


def run_rank(options: argparse.Namespace, folder: Path) -> int:
    """The tests, in one of the ranks."""
    import torch

    from megatron_tiling import cpu

    torch.set_num_threads(1)
    use_no_flash_attention()
    if options.gpus:
        use_unfused_attention()
    else:
        cpu.install()
        use_local_specs()
    if over_gloo(options):
        destroy_groups_too()
    rank = os.environ["RANK"]
    outcomes = Outcomes(options.factor if options.tiles else None, options.gpus)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    pytest.main([*PYTEST, "--rootdir", str(folder), *options.files], plugins=[outcomes])
    Path(folder, f"outcomes.{rank}").write_text(json.dumps({"outcomes": outcomes.found, "made": outcomes.made}))
    return 0


# --- the run --------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, folder: Path, tiles: bool) -> dict[str, tuple[str, str]]:
    """All ranks. A test's outcome is that of its worst rank."""
    for file in folder.glob("outcomes.*"):
        file.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.world)]
    command = [*launcher, __file__, "--rank-folder", str(folder), "--factor", str(options.factor)]
    command += ["--world", str(options.world), *options.files]
    command += ["--gpus"] if options.gpus else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    log = Path(options.log or folder, f"{'tiled' if tiles else 'stock'}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        subprocess.run(
            [*command, *(["--tiles"] if tiles else [])], env=environment, stdout=output, stderr=output, check=False
        )
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("outcomes.*"))]
    if len(ranks) != options.world:
        raise SystemExit(f"only {len(ranks)} of {options.world} ranks came to the end, see {log}:\n{tail(log)}")
    if tiles:
        print("modules built on rank 0:", json.dumps(ranks[0]["made"], indent=2), flush=True)
    return dict(worst([rank["outcomes"] for rank in ranks]))


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-60:])


def worst(ranks: list[dict[str, tuple[str, str]]]) -> Iterator[tuple[str, tuple[str, str]]]:
    order = ["failed", "skipped", "passed"]
    for test in dict.fromkeys(test for rank in ranks for test in rank):
        found = [tuple(rank.get(test, ("failed", "not run on every rank"))) for rank in ranks]
        yield test, min(found, key=lambda outcome: order.index(outcome[0]))  # type: ignore[misc]


def report(stock: dict[str, tuple[str, str]], tiled: dict[str, tuple[str, str]]) -> int:
    """The table of what did not pass, and the exit code."""
    for name, run in (("stock", stock), ("tiled", tiled)):
        counts = collections.Counter(outcome for outcome, _ in run.values())
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for test, (outcome, reason) in stock.items():
        if outcome != "passed":
            file, _, name = test.removeprefix("tests/unit_tests/").partition("::")
            reasons.setdefault((file, outcome, reason), []).append(name)
    for (file, outcome, reason), names in reasons.items():
        print(f"{outcome} with stock layers, {file}, {len(names)}: {reason[:200]}\n    " + "\n    ".join(names))
    passed = [{test for test, (outcome, _) in run.items() if outcome == "passed"} for run in (stock, tiled)]
    lost, gained = sorted(passed[0] - passed[1]), sorted(passed[1] - passed[0])
    for test in lost:
        print(f"passes with stock layers only: {test}: {tiled.get(test)}")
    for test in gained:
        print(f"passes with tiled layers only: {test}")
    same = bool(passed[0]) and not lost and not gained
    print("the same tests pass" if same else "NOT the same tests pass, or none")
    return 0 if same else 1


def checkout_of_tag(folder: Path) -> Path:
    git = os.environ.get("MEGATRON_LM_GIT")
    if git is None:
        raise SystemExit("give a Megatron-LM checkout, or set MEGATRON_LM_GIT to a git directory of Megatron-LM")
    archive = subprocess.run(["git", "-C", git, "archive", TAG, "tests"], capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", help="test files of the checkout, by default all that this script is for")
    parser.add_argument("--checkout", type=Path, help="of Megatron-LM; by default the tag's out of MEGATRON_LM_GIT")
    parser.add_argument("--world", type=int, default=8, help="ranks")
    parser.add_argument("--factor", type=int, default=3, help="tiles a layer")
    parser.add_argument("--gpus", action="store_true", help="one a rank, with TransformerEngine")
    parser.add_argument("--log", type=Path, help="folder that keeps both runs' output")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiles", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.files = options.files or list(FILES)
    if options.rank_folder:
        return run_rank(options, options.rank_folder)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        folder.mkdir()
        edits = (*GPU_EDITS, *(GLOO if over_gloo(options) else ())) if options.gpus else EDITS
        adapted(options.checkout or checkout_of_tag(Path(place, "checkout")), folder, edits)
        return report(run_all(options, folder, tiles=False), run_all(options, folder, tiles=True))


if __name__ == "__main__":
    sys.exit(main())

"""examples/gpt/train.sh, the README's first command, on little text and for a few iterations."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.launch import EXAMPLES, ROOT


def test_what_is_shown_of_a_log() -> None:
    shown = [
        "megatron_tiling: tiled linear layers:",
        "module        layers  features in x out  tiles in x out  tile MiB",
        "output_layer  1       48 x 128           -               -         loss in tiles",
        "--tiled-linear-splits experts=8 has no effect here: there is no such layer",
    ]
    log = "\n".join(["building GPT model ...", *shown, "--and this is of a script"])
    command = [sys.executable, EXAMPLES / "plot_loss.py", "follow"]
    done = subprocess.run(command, input=log, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == shown


def test_train_script(tmp_path: Path) -> None:
    """It ends with one line that compares both runs, and leaves the picture."""
    prepare = [sys.executable, EXAMPLES / "prepare_data.py", "--output", tmp_path / "text", "--vocab-size", "400"]
    subprocess.run([*prepare, "--input", ROOT / "megatron_tiling"], check=True, stdout=subprocess.DEVNULL)
    settings = {"READY_PYTHON": sys.executable, "TRAIN_DATA": f"{tmp_path}/text", "TRAIN_OUT": str(tmp_path)}
    few = "--train-iters 3 --lr-warmup-iters 1 --num-layers 1".split()
    done = subprocess.run(
        [EXAMPLES / "train.sh", *few],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(
        r"tiled: first loss .* at iteration 3 .* largest \|dense - tiled\| (\S+); curves in (\S+)", last
    )
    assert found and float(found[1]) < 1e-4 and Path(found[2]).stat().st_size > 0, last
    assert re.search(r"mlp\.linear_fc1 .* 1x4 .*TiledMLP", done.stdout)
    assert re.search(r"output_layer .* loss in tiles", done.stdout)

"""DPO: losses and gradients against float64 by hand; runs of the example, tiled and dense; its refusals."""

import json
import math
import re

import pytest

from tests.support.launch import EXAMPLES, TRAIN_MANY, torchrun
from tests.support.training import COMMON, LLAMA

ITERATIONS = 6
SETTINGS = (
    f"{LLAMA} --use-cpu-initialization --make-vocab-size-divisible-by 32 --hidden-dropout 0 --global-batch-size 4 "
    f"--train-iters {ITERATIONS} --lr 1e-2 --ckpt-format torch_dist --split 100,0,0"
)
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_losses_and_gradients_equal_float64_by_hand(tensor_parallel):
    assert "equal" in torchrun("-m", "tests.examples.check_dpo", world=tensor_parallel)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dpo")
    lines = [
        {"prompt": f"{index % 90} 7", "chosen": "3 5" + " 3" * (index % 3), "rejected": "8 9 8"} for index in range(20)
    ]
    (folder / "preferences.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = " ".join(flag for flag in COMMON if flag != "--mock-data")
    dpo = f"{EXAMPLES}/dpo_gpt.py {common} {SETTINGS} --data-path {folder}/preferences.jsonl --dpo-beta 0.5"
    base = f"{TP2} --pretrained-checkpoint {folder}/dense"
    dense = "--no-gradient-accumulation-fusion"
    saved = f"--use-tiled-linear --tile-factor 3 {base} --save {folder}/tuned --load {folder}/tuned --save-interval 3"
    runs = {
        "pretrain": f"{EXAMPLES}/pretrain_gpt.py {common} {SETTINGS} {dense} --mock-data --save {folder}/dense "
        "--save-interval 2 --exit-interval 2",
        "tiled": f"{dpo} {saved} --exit-interval 3",
        "tiled, on": f"{dpo} {saved}",
        "dense": f"{dpo} {dense} {base}",
        "odd": f"{dpo} {base} {dense} --micro-batch-size 1",
        "spiky": f"{dpo} {base} {dense} --check-for-spiky-loss",
    }
    records = [{"name": name, "log": str(folder / f"{name}.log"), "argv": argv.split()} for name, argv in runs.items()]
    (folder / "runs.json").write_text(json.dumps(records))
    torchrun(TRAIN_MANY, folder / "runs.json", world=2)
    return {name: "".join((folder / f"{name}.log.{rank}").read_text() for rank in range(2)) for name in runs}


def values(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name}: ([0-9.E+-]+)", log)]


@pytest.mark.feature("DPO on output processors")
def test_the_example_learns_preferences(logs: dict[str, str]) -> None:
    tiled = values(logs["tiled"], "dpo loss") + values(logs["tiled, on"], "dpo loss")
    dense = values(logs["dense"], "dpo loss")
    assert len(tiled) == len(dense) == ITERATIONS, logs["tiled"][-3000:] + logs["dense"][-3000:]
    assert abs(dense[0] - math.log(2)) < 1e-5  # the policy is the reference still
    # The trainer logs the mean of two iterations as the second loss of a run.
    assert max(abs(tiled[i] - dense[i]) for i in (0, 2, 3, 5)) < 5e-5, (tiled, dense)
    assert dense[-1] < 0.9 * dense[0] and values(logs["dense"], "dpo accuracy")[-1] == 1
    assert "give an even --micro-batch-size, not 1" in logs["odd"]
    assert "--check-for-spiky-loss: not in this example" in logs["spiky"]

"""What the DeepSpeed engine would not follow of Megatron's flags, and what an example refuses beside it."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_tiling.arguments import REFUSED
from megatron_tiling.zero3.config import check_flags


def test_flags_that_the_engine_follows() -> None:
    check_flags(Namespace())
    check_flags(
        Namespace(pipeline_model_parallel_size=1, num_experts=None, tiled_linear_storage="auto", optimizer="sgd")
    )


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("pipeline_model_parallel_size", 2, "--pipeline-model-parallel-size 2: "),
        ("context_parallel_size", 2, "--context-parallel-size 2: "),
        ("num_experts", 4, "--num-experts 4: "),
        ("mtp_num_layers", 1, "--mtp-num-layers 1: "),
        ("use_distributed_optimizer", True, "--use-distributed-optimizer: "),
        ("use_megatron_fsdp", True, "--use-megatron-fsdp: "),
        ("use_torch_fsdp2", True, "--use-torch-fsdp2: "),
        ("tiled_linear_storage", "resident", "--tiled-linear-storage resident: "),
        ("overlap_grad_reduce", True, "--overlap-grad-reduce: "),
        ("overlap_param_gather", True, "--overlap-param-gather: "),
        ("rampup_batch_size", ["2", "2", "8"], "--rampup-batch-size ['2', '2', '8']: "),
        ("decoupled_lr", 0.1, "--decoupled-lr 0.1: "),
        ("cpu_offloading_num_layers", 1, "--cpu-offloading-num-layers 1: "),
    ],
)
def test_flags_that_it_does_not_follow_are_refused(argument: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_flags(Namespace(**{argument: value}))
    assert str(refusal.value).startswith(f"ZeRO-3 with {words}")


def test_no_row_speaks_of_an_example() -> None:
    for row in REFUSED["ZeRO-3"]:
        assert "example" not in row.reason + row.remedy and "script" not in row.reason + row.remedy

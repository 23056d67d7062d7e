"""Scores out of stock models, under torchrun."""

import inspect

import pytest
from megatron.core.models.gpt import GPTModel

from megatron_tiling import score_processor
from tests.support.launch import torchrun

HAS_PROCESSORS = "output_processor" in inspect.signature(GPTModel.forward).parameters


@pytest.mark.feature("scores through an output processor")
@pytest.mark.skipif(not HAS_PROCESSORS, reason="GPTModel takes processors from megatron-core 0.18 on")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_scores_of_a_stock_model(tensor_parallel):
    output = torchrun("-m", "tests.resident.check_score_processor", world=tensor_parallel)
    assert "scores equal those of whole logits" in output


def test_a_megatron_without_processors_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(GPTModel, "forward", lambda self: None)
    with pytest.raises(ValueError, match=r"no output_processor before megatron-core 0\.18"):
        score_processor(torch.zeros(1, 1, dtype=torch.int64))

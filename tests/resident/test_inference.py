"""Megatron's own inference engines generate alike with dense and tiled models: check_inference.py."""

import importlib.util

import pytest
import torch

from tests.support.launch import torchrun


@pytest.mark.feature("generation with Megatron's static engine")
def test_the_static_engine_generates_the_same() -> None:
    said = torchrun("-m", "tests.resident.check_inference", "static", world=1)
    assert "the static engine generates the same" in said


@pytest.mark.feature("generation with Megatron's dynamic engine")
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a GPU and flash attention",
)
def test_the_dynamic_engine_generates_the_same() -> None:
    said = torchrun("-m", "tests.resident.check_inference", "dynamic", world=1)
    assert "the dynamic engine generates the same" in said

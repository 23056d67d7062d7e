"""Settings of the whole suite: one thread, no hypothesis deadline (2 cores run several processes).

Without a GPU, Triton's kernels run in its interpreter, on the CPU.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import torch

from tests.support.feature_outcomes import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

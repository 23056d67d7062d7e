"""Settings of the whole suite: one thread, no hypothesis deadline (2 cores run several processes).

Without a GPU, Triton's kernels run in its interpreter, on the CPU. What torch compiles goes to a folder of the suite's
own: a build that was killed leaves a lock in the user's, for which all later ones wait.
"""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("PYTORCH_ALLOC_CONF", None)  # the planner counts fragmentation, or does not, by them
os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share their parent's
    EXTENSIONS = tempfile.TemporaryDirectory()
    os.environ["TORCH_EXTENSIONS_DIR"] = EXTENSIONS.name

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.feature_outcomes import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture(autouse=True)
def attention_of_each_test() -> Iterator[None]:
    """The first model of a process chooses attention for all: Megatron sets these variables, and then asks for them."""
    before = {name: os.environ[name] for name in ATTENTION if name in os.environ}
    yield
    for name in ATTENTION:
        os.environ.pop(name, None)
    os.environ.update(before)

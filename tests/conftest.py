"""Settings of the whole suite: one thread, no hypothesis deadline (2 cores run several processes)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
from feature_outcomes import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

"""Phases of peaks, as they are watched where a command is measured."""

import os
import re
import subprocess
import sys

from tests.plan.check_fake import MODELS
from tests.support.launch import ENVIRONMENT, ROOT, search_path


def test_phases_as_the_planners_tracker_finds_them() -> None:
    """On real tensors, in models of which it is the loss, an MLP, and a layer that is made again."""
    command = [sys.executable, "-m", "tests.plan.check_watched_phases"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": search_path()}
    output = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(.*): (\d+) (.*) / (.*)$", output, re.M)
    assert len(found) == len(MODELS) and len({watched for *_, watched, _ in found}) > 2, output
    for name, bytes_, watched, tracked in found:
        assert (bytes_, watched) == ("0", tracked), name

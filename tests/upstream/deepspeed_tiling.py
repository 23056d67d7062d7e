"""Run DeepSpeed's own tests of TiledLinear against ours.

    python tests/upstream/deepspeed_tiling.py DEEPSPEED_CHECKOUT [--seeds 100]

Takes tests/unit/runtime/zero/test_zero_tiled.py of a DeepSpeed checkout and changes three things: the import, the
skip marks (removed), and the float comparisons (atol=1e-6: an exact float64 layer fails their default now and then).
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TESTS = Path("tests/unit/runtime/zero/test_zero_tiled.py")


def adapt(source: str) -> str:
    """The upstream test file, for our classes."""
    source, imports = re.subn(r"from deepspeed\.runtime\.zero\.tiling import", "from megatron_tiling import", source)
    source, skips = re.subn(r"(?m)^@pytest\.mark\.skip\(.*\)\n", "", source)
    source, comparisons = re.subn(r"rtol=1e-4\)", "rtol=1e-4, atol=1e-6)", source)
    if (imports, skips) != (1, 3) or not comparisons:
        raise SystemExit(f"not the file this script knows: {imports} imports, {skips} skip marks, {comparisons} rtol")
    return source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()

    class Seeds:
        @pytest.fixture(autouse=True, params=range(args.seeds))
        def seed(self, request: pytest.FixtureRequest) -> None:
            torch.manual_seed(request.param)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, TESTS.name)
        path.write_text(adapt((args.checkout / TESTS).read_text()))
        return pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, str(path)], plugins=[Seeds()])


if __name__ == "__main__":
    sys.exit(main())

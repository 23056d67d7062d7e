#!/usr/bin/env bash
# All checks: tools/lint.sh, then the tests. Sets itself up first.
#
#   tools/test.sh [PYTEST ARGUMENTS, e.g. tests/tiles/test_tiled_linear.py -k bias]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
tools/lint.sh
if (($# == 0)) && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -m pytest tests/tiles/*_gpu.py tests/tiles/test_activation.py tests/tiles/kernels
fi
outcomes=$(mktemp)
# Over gloo, also where there are GPUs. Two files at a time: many a step runs on one core.
CUDA_VISIBLE_DEVICES= python -m pytest --numprocesses 2 --dist loadfile --feature-outcomes="$outcomes" "$@"
if (($# == 0)); then
    tools/support_matrix.py --check "$outcomes"
fi

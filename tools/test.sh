#!/usr/bin/env bash
# All checks: lint, format, types, tests. Sets itself up first.
#
#   tools/test.sh [PYTEST ARGUMENTS, e.g. tests/test_tiling.py -k bias]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"

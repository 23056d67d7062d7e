#!/usr/bin/env bash
# Lint, format, types, and that imports point down the rooms. tools/test.sh and pre-commit run it.
set -euo pipefail
(($# == 0)) || { echo "lint.sh: $*: it takes no arguments, and checks everything" >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports --no-logo

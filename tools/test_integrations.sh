#!/usr/bin/env bash
# Tests with the packages of the trainers that megatron_tiling.integrations hooks: tests/integrations, on a CPU.
# Without arguments it also compares what ran with the table of docs/integrations.md.
#
# They go into .venv-integrations (100 MB) beside .venv, without what they require and these tests do not import:
# Megatron-Bridge alone requires flashinfer, datasets and wandb. TransformerEngine is tests/stand_ins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh
packages=(megatron-bridge mcore-bridge verl peft accelerate omegaconf hydra-core antlr4-python3-runtime)
if [[ ! -e .venv-integrations/.ready || tools/constraints.txt -nt .venv-integrations/.ready ]]; then
    rm -rf .venv-integrations
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint tools/constraints.txt \
        --target .venv-integrations "${packages[@]}"
    rm -rf .venv-integrations/tests .venv-integrations/scripts # of verl's wheel
    touch .venv-integrations/.ready
fi
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONPATH="$PWD/.venv-integrations"
outcomes=$(mktemp)
.venv/bin/python -m pytest tests/integrations tests/test_spec.py --feature-outcomes="$outcomes" "$@"
if (($# == 0)); then
    tools/support_matrix.py --page integrations --check "$outcomes"
fi

#!/usr/bin/env bash
# The tests that lean on torch most and take no minutes, with another torch than tools/constraints.txt pins.
#
#   tools/test_torch.sh newest          tools/test_torch.sh 2.10 [PYTEST ARGUMENTS]
#
# Makes .venv-torch-VERSION first (about 6 GB). A torch that cannot be installed is no failure, and said at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?say which torch: newest, or a version}
tools/setup.sh "$version" || {
    (($? == 3)) || exit 1
    echo "skipped: torch $version is not to be had"
    exit
}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PATH="$PWD/.venv-torch-$version/bin:$PATH"
python -c 'import torch; print("torch", torch.__version__)'
python -m pytest --numprocesses 2 --dist loadfile -k "FSDP2 or not test_checkpoints" \
    tests/test_config.py tests/tiles tests/resident tests/partitioned tests/trainer/test_checkpoints.py "${@:2}"

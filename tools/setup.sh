#!/usr/bin/env bash
# Make .venv, with the project, its tests' tools and the example's libraries in it. Needs Python >= 3.12 and a
# compiler. Quick when there is nothing to do, so every command of the project starts with it.
#
#   tools/setup.sh            PYTHON=/path/to/python3.12 tools/setup.sh
#   tools/setup.sh 2.10       .venv-torch-2.10, with that torch in place of the pinned one; or `newest`
#
# Exits with 3 where that torch cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=${1:-}
venv=.venv${torch:+-torch-$torch}
(($# < 2)) || { echo "setup: ${*:2}: it takes one argument, a version of torch" >&2 && exit 2; }
prefix() { "$1" -c 'import sys; print(sys.base_prefix)' 2>/dev/null; }
if [[ -n ${PYTHON:-} && -x $venv/bin/python && $(prefix "$PYTHON") != $(prefix "$venv/bin/python") ]]; then
    echo "setup: $venv is there, of $(prefix "$venv/bin/python"): PYTHON=$PYTHON has no effect; remove $venv first" >&2
fi
ready=$venv/.ready-$({ pwd; cat pyproject.toml tools/constraints.txt; } | cksum | tr ' ' -)
[[ -e $ready && -x $venv/bin/python && $torch != newest ]] && exit 0

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        new_enough "$PYTHON" && echo "$PYTHON" && return
        echo "setup: PYTHON=$PYTHON is not a Python >= 3.12" >&2
        return 1
    fi
    local candidate # a pyenv shim may be on the PATH and yet refuse to run, so each one is tried
    for candidate in python3.12 python3 "$HOME"/.pyenv/versions/3.12*/bin/python3; do
        new_enough "$candidate" && echo "$candidate" && return
    done
    echo "setup: no Python >= 3.12 found as python3.12 or python3, nor in ~/.pyenv; give one as PYTHON=..." >&2
    return 1
}

if ! new_enough "$venv/bin/python"; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" # Debian and Ubuntu keep this in a package python3.12-venv
fi
echo "setup: installing megatron-tiling and what it needs into $venv (some minutes the first time)"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
constraints=tools/constraints.txt
if [[ -n $torch ]]; then
    wanted=torch==$torch
    timeout 20m "${install[@]}" --upgrade "${wanted%==newest}" || exit 3
    constraints=$venv/constraints.txt
    grep -v '^torch==' tools/constraints.txt >"$constraints"
fi
"${install[@]}" --constraint "$constraints" --editable '.[dev]'
rm -f "$venv"/.ready-*
touch "$ready"

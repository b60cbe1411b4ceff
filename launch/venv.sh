#!/usr/bin/env bash
# Create a virtual environment with the pinned versions and this checkout. If it is up to date, do nothing.
#
#   bash launch/venv.sh [DIR]                   default DIR: .venv in the checkout
#   PYTHON=python3.12 bash launch/venv.sh       use this Python; default: the first supported one
#
# PyPI's torch contains CUDA (about 5 GB). On a machine without a GPU this command saves 4 GB:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/venv.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$(realpath -m "${1:-$root/.venv}")
stamp=$dir/minitron-mp.stamp

fail() {
    echo "launch/venv.sh: $*" >&2
    exit 1
}

# Print version and base interpreter of a Python. It fails if the Python is unsupported or does not run.
probe() {
    "$1" -c '
import sys
assert (3, 10) <= sys.version_info < (3, 13)
print("%d%d" % sys.version_info[:2], getattr(sys, "_base_executable", None) or sys.executable)
' 2>/dev/null
}

if [[ -n ${PYTHON:-} ]]; then
    interpreter=$(probe "$PYTHON") || fail "PYTHON=$PYTHON does not run or is not Python 3.10, 3.11 or 3.12"
else
    interpreter=
    candidates=(python3.11 python3.12 python3.10 python3)
    if [[ -s $stamp ]]; then candidates=("$dir/bin/python" "${candidates[@]}"); fi # keep the environment
    for candidate in "${candidates[@]}"; do
        if interpreter=$(probe "$candidate"); then break; fi
    done
    [[ -n $interpreter ]] || fail "needs Python 3.10, 3.11 or 3.12; install one, or set PYTHON=/path/to/python3.11"
fi
read -r version python <<<"$interpreter"
constraints=$root/constraints/py$version.txt

# The hash includes the paths, because an environment with an editable install cannot be moved.
pins=$({ echo "$root $dir"; cat "$constraints" "$root/setup.py"; } | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$pins" ]]; then
    echo "$dir is ready ($python)"
    exit
fi

# Delete only environments of this script. The stamp is created first (empty) and filled last.
if [[ -d $dir && ! -f $stamp && -n $(ls -A "$dir") ]]; then
    fail "$dir exists and was not created by this script; delete it, or give another DIR"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks the venv module; on Debian and Ubuntu: apt install python3-venv"
mkdir -p "$dir"
: >"$stamp"
find "$dir" -mindepth 1 ! -path "$stamp" -delete

echo "Creating $dir with $python and the versions in $constraints"
if [[ -z ${PIP_EXTRA_INDEX_URL:-} ]] && ! command -v nvidia-smi >/dev/null; then
    echo "No NVIDIA GPU found. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves 4 GB of CUDA"
fi
"$python" -m venv "$dir"
quiet=()
[[ -t 1 ]] || quiet=(--quiet)
"$dir/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check \
    --editable "${root}[quickstart,dev]" --constraint "$constraints"
echo "$pins" >"$stamp"
echo "$dir is ready; activate it with: . $dir/bin/activate"

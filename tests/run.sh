#!/usr/bin/env bash
# Lint, check types and test, in the pinned environment (launch/venv.sh makes it the first time). Other arguments go to pytest.
#
#   bash tests/run.sh                       lint, and all tests but the slow ones
#   bash tests/run.sh --all                 the slow ones as well
#   bash tests/run.sh tests/unit            one folder or file
#   bash tests/run.sh --lint                ruff, mypy, shellcheck, hadolint
#   bash tests/run.sh --suite               the tests alone
#   bash tests/run.sh --py312               layouts, checkpoints and Hugging Face folders on Python 3.12 and Megatron-Core 0.19
#   bash tests/run.sh --cluster             Slurm on this machine (as root, where apt works)
#   bash tests/run.sh --docker              the Dockerfile on a stand-in base (as root, where apt works)
#   VENV=/path/to/env bash tests/run.sh     another place for the environment; VENV312 for that of --py312, PYTHON312 for its Python
#
# A leg that cannot run here says why and ends with code 77.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# What differs between the two lines of Megatron-Core: models at every layout, their optimizer, checkpoints, the road in and out.
on_py312=(
    tests/unit/test_hf.py tests/ranks/test_slicing.py tests/ranks/test_importance.py tests/ranks/test_training.py
    tests/ranks/test_hidden_states.py tests/ranks/test_search.py tests/ranks/test_precision.py
)

skip() {
    echo "skipped: $*"
    exit 77
}

# need COMMAND PACKAGE...: from Debian or Ubuntu, where it is not there
need() {
    command -v "$1" >/dev/null && return
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then skip "no $1 here, and it takes root and apt-get to install it"; fi
    { timeout 300 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install --no-install-recommends "${@:2}"; } >/dev/null 2>&1 ||
        skip "no $1 here, and apt-get could not install it"
}

pinned() {
    bash launch/venv.sh "$venv"
    export PATH=$venv/bin:$PATH
}

lint() {
    ruff check
    ruff format --check
    mypy
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 shellcheck -x
    hadolint Dockerfile
}

# Two at a time: many tests wait, for a bound or for a process of their own. conftest.py says who takes what.
whole() {
    python -m pytest --durations=10 -n 2 --no-loadscope-reorder "$@"
}

# A Python with NeMo-Run over the pinned environment: it wants an older urllib3 than the pins have. Where pip cannot make it, its test is skipped.
with_nemo_run() {
    local dir=$venv-nemo
    if [[ ! -e $dir/minitron-mp.stamp ]]; then
        rm -rf "$dir"
        "$venv/bin/python" -m venv "$dir"
        "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth"
        timeout 300 "$dir/bin/pip" install -q nemo-run 'leptonai<0.47' >/dev/null 2>&1 || { echo "pip cannot install nemo-run" >&2; return; }
        touch "$dir/minitron-mp.stamp"
    fi
    export MINITRON_NEMO_PYTHON=$dir/bin/python
}

py312() {
    local candidate python=
    for candidate in "${PYTHON312:-}" python3.12 "$HOME"/.pyenv/versions/3.12.*/bin/python3.12 "$(uv python find 3.12 2>/dev/null || true)"; do
        if "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || skip "no Python 3.12 on the path, from pyenv or from uv; name one: PYTHON312=/path/to/python3.12"
    local dir=${VENV312:-$PWD/.venv312}
    if [[ ! -s $dir/minitron-mp.stamp ]]; then
        # PyPI has torch for 3.12 with CUDA only: 5.5 GB on disk.
        local free
        free=$(df --output=avail -B1G "$(dirname "$dir")" | tail -1)
        ((free >= 12)) || skip "an environment with PyTorch's CUDA build takes 5.5 GB, and as much while it is made; $free GB are free"
        if [[ -z ${PIP_EXTRA_INDEX_URL:-} ]] && curl -sfI -m 10 https://download.pytorch.org/whl/cpu/torch/ >/dev/null; then
            export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
        fi
    fi
    PYTHON=$python timeout 900 bash launch/venv.sh "$dir" || skip "no environment for Python 3.12 could be made within 15 minutes"
    PATH=$dir/bin:$PATH whole -m "not slow" "${on_py312[@]}" "$@"
}

case ${1:-} in
--lint)
    pinned
    lint
    ;;
--suite)
    pinned
    whole -m "not slow" "${@:2}"
    ;;
--py312) py312 "${@:2}" ;;
--cluster)
    pinned
    [[ -n ${MINITRON_NEMO_PYTHON:-} ]] || with_nemo_run
    python -m pytest -rs --durations=5 tests/cluster "${@:2}"
    ;;
--docker)
    need buildah buildah
    need debootstrap debootstrap
    pinned
    python -m pytest -rs --durations=5 tests/docker "${@:2}"
    ;;
--all)
    # The real model, when the quick start has fetched it.
    if [[ -z ${MINITRON_SMOLLM2:-} && -f out/quickstart/teacher_hf/config.json ]]; then export MINITRON_SMOLLM2=$PWD/out/quickstart/teacher_hf; fi
    pinned
    lint
    if (($# > 1)); then python -m pytest --durations=10 "${@:2}"; else whole; fi
    ;;
"")
    pinned
    lint
    whole -m "not slow"
    ;;
*)
    pinned
    lint
    python -m pytest --durations=10 -m "not slow" "$@"
    ;;
esac

#!/usr/bin/env bash
# Lint, check types and run tests in the pinned environment, which launch/venv.sh makes at the first run.
# Other arguments are passed to pytest. With them, lint and types are not checked: only the tests run.
#
#   bash tests/run.sh                       lint, and all tests except the slow ones
#   bash tests/run.sh --all                 lint, and all tests
#   bash tests/run.sh tests/unit            one folder or file, without lint
#   bash tests/run.sh FILE -k tp2           some tests of a file, without lint
#   bash tests/run.sh --all FILE            a file with its slow tests, without lint
#   bash tests/run.sh --lint                ruff, mypy, shellcheck, hadolint
#   bash tests/run.sh --suite               the tests without lint
#   bash tests/run.sh --py312               layouts, checkpoints and Hugging Face folders on Python 3.12
#                                           and Megatron-Core 0.19
#   bash tests/run.sh --bridge              inside Megatron-Bridge, on Python 3.12
#   bash tests/run.sh --rehearse            benchmarks/first_gpu.sh on a CPU, at tiny sizes
#   bash tests/run.sh --rehearse-node       benchmarks/first_node.sh on 4 CPU ranks
#   bash tests/run.sh --cluster             Slurm on this machine (needs root and apt)
#   bash tests/run.sh --docker              the Dockerfile on a stand-in base (needs root and apt)
#   bash tests/run.sh --readers [FOLDER]    exported students in transformers 4, llama.cpp and CTranslate2;
#                                           FOLDER: an exported student, default the quick start's
#   VENV=/path/to/env bash tests/run.sh     use another environment; for --py312 and --bridge: VENV312, and
#                                           PYTHON312 for its Python
#
# A part that cannot run on this machine prints the reason and exits with code 77.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Tests of what differs between the two lines of Megatron-Core: models for every layout, optimizer,
# checkpoints, and conversion to and from Hugging Face.
on_py312=(
    tests/unit/test_hf.py tests/ranks/test_slicing.py tests/ranks/test_importance.py
    tests/ranks/test_training.py tests/ranks/test_hidden_states.py tests/ranks/test_search.py
    tests/ranks/test_precision.py
)

skip() {
    echo "skipped: $*"
    exit 77
}

# need COMMAND PACKAGE...: install packages of Debian or Ubuntu unless the command exists
need() {
    command -v "$1" >/dev/null && return
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
        skip "$1 is missing, and root and apt-get are needed to install it"
    fi
    {
        timeout 300 apt-get -qq update &&
            DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install --no-install-recommends "${@:2}"
    } >/dev/null 2>&1 || skip "$1 is missing, and apt-get could not install it"
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

# Two pytest processes, because many tests wait for a timeout or a subprocess. conftest.py assigns the files.
run_tests() {
    python -m pytest --durations=10 -n 2 --no-loadscope-reorder "$@"
}

# extend DIR BASE: make an environment unless DIR is complete, and let it import what BASE has installed
extend() {
    local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    if [[ ! -e $1/minitron-mp.stamp ]]; then
        rm -rf "$1"
        "$2/bin/python" -m venv "$1"
    fi
    "$2/bin/python" -c "$purelib" >"$("$1/bin/python" -c "$purelib")/base.pth"
}

# Make an environment with NeMo-Run on top of the pinned one, because NeMo-Run needs an older urllib3 than
# the pins have. If pip cannot make it, the test is skipped.
with_nemo_run() {
    local dir=$venv-nemo
    extend "$dir" "$venv"
    if [[ ! -e $dir/minitron-mp.stamp ]]; then
        timeout 300 "$dir/bin/pip" install -q nemo-run 'leptonai<0.47' >/dev/null 2>&1 || {
            echo "pip cannot install nemo-run" >&2
            return
        }
        touch "$dir/minitron-mp.stamp"
    fi
    export MINITRON_NEMO_PYTHON=$dir/bin/python
}

# Make an environment with the programs that read exported folders, on top of the pinned one, because they
# need an older transformers. Building llama.cpp takes 5 to 30 minutes on 2 cores.
with_readers() {
    local dir=${VENV_READERS:-$venv-readers} log requirements=tests/readers/requirements.txt source
    source=$(grep ^llama-cpp-python "$requirements")
    if [[ ! -e $dir/minitron-mp.stamp ]]; then
        need cmake cmake
        need g++ g++
    fi
    extend "$dir" "$venv"
    if [[ ! -e $dir/minitron-mp.stamp ]]; then
        log=$dir/install.log
        mkdir "$dir/llama_cpp"
        # The converter is in the source of the Python package only.
        {
            timeout 300 "$dir/bin/pip" download -q --no-deps --no-binary llama-cpp-python -d "$dir" "$source" &&
                tar -xzf "$dir"/llama_cpp_python-*.tar.gz -C "$dir/llama_cpp" --strip-components 1 &&
                CMAKE_BUILD_PARALLEL_LEVEL=${READERS_JOBS:-2} \
                    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
                    timeout 3000 "$dir/bin/pip" install -q -r "$requirements"
        } >"$log" 2>&1 || skip "pip cannot install the programs: $(tail -1 "$log")"
        touch "$dir/minitron-mp.stamp"
    fi
    export MINITRON_READERS_PYTHON=$dir/bin/python
    export MINITRON_LLAMA_CPP_CONVERTER=$dir/llama_cpp/vendor/llama.cpp/convert_hf_to_gguf.py
}

# Make the environment for Python 3.12 and put it on the PATH.
with_py312() {
    local candidate python=
    for candidate in "${PYTHON312:-}" python3.12 "$HOME"/.pyenv/versions/3.12.*/bin/python3.12 \
        "$(uv python find 3.12 2>/dev/null || true)"; do
        if "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || skip "no Python 3.12 on the PATH, in pyenv or in uv; set PYTHON312=/path/to/python"
    venv=${VENV312:-$PWD/.venv312}
    if [[ ! -s $venv/minitron-mp.stamp ]]; then
        # PyPI's torch for 3.12 includes CUDA: 5.5 GB on disk.
        local free
        free=$(df --output=avail -B1G "$(dirname "$venv")" | tail -1)
        ((free >= 12)) ||
            skip "an environment with PyTorch's CUDA build needs 12 GB to install; $free GB are free"
        local cpu_index=https://download.pytorch.org/whl/cpu
        if [[ -z ${PIP_EXTRA_INDEX_URL:-} ]] && curl -sfI -m 10 "$cpu_index/torch/" >/dev/null; then
            export PIP_EXTRA_INDEX_URL=$cpu_index
        fi
    fi
    PYTHON=$python timeout 900 bash launch/venv.sh "$venv" ||
        skip "launch/venv.sh made no environment for Python 3.12 within 15 minutes"
    export PATH=$venv/bin:$PATH
}

# Make an environment with Megatron-Bridge on top of the one for Python 3.12. Bridge pins versions that pip
# cannot resolve together, so it is installed without its dependencies, and those that it imports follow.
with_bridge() {
    local dir=${VENV_BRIDGE:-$PWD/.venv-bridge} pins=tests/support/bridge_requirements.txt log site
    cmp -s "$pins" "$dir/minitron-mp.stamp" || rm -f "$dir/minitron-mp.stamp"
    extend "$dir" "$venv"
    if [[ ! -e $dir/minitron-mp.stamp ]]; then
        site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        log=$dir/install.log
        {
            # nvidia-resiliency-ext has wheels for newer systems only; none of its binaries is used here.
            timeout 900 "$dir/bin/pip" install -q --no-deps -r "$pins" &&
                timeout 300 "$dir/bin/pip" install -q --no-deps --platform manylinux_2_39_x86_64 \
                    --only-binary=:all: --target "$site" nvidia-resiliency-ext==0.6.0
        } >"$log" 2>&1 || skip "pip cannot install Megatron-Bridge: $(tail -1 "$log")"
        cp "$pins" "$dir/minitron-mp.stamp"
    fi
    export PATH=$dir/bin:$PATH
}

case ${1:-} in
--lint)
    pinned
    lint
    ;;
--suite)
    pinned
    run_tests -m "not slow" "${@:2}"
    ;;
--py312)
    with_py312
    run_tests -m "not slow" "${on_py312[@]}" "${@:2}"
    ;;
--bridge)
    with_py312
    with_bridge
    python -m pytest -rs --durations=5 tests/ranks/test_megatron_bridge.py "${@:2}"
    ;;
--rehearse | --rehearse-node)
    pinned
    kind=gpu
    [[ $1 == --rehearse ]] || kind=node
    output=$(mktemp -d)
    trap 'rm -rf "$output"' EXIT
    PYTHON=python bash "benchmarks/first_$kind.sh" --rehearse --output "$output" "${@:2}"
    ;;
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
--readers)
    pinned
    with_readers
    model=${2:-out/quickstart/student_hf}
    if [[ -f $model/config.json ]]; then
        export MINITRON_READERS_MODEL=$model
    elif (($# > 1)); then
        echo "$model has no config.json; give the folder of an exported student" >&2
        exit 2
    fi
    python -m pytest -rs tests/readers
    ;;
--all)
    # Use the real model if the quickstart has downloaded it.
    if [[ -z ${MINITRON_SMOLLM2:-} && -f out/quickstart/teacher_hf/config.json ]]; then
        export MINITRON_SMOLLM2=$PWD/out/quickstart/teacher_hf
    fi
    pinned
    if (($# > 1)); then
        python -m pytest --durations=10 "${@:2}"
    else
        lint
        run_tests
    fi
    ;;
"")
    pinned
    lint
    run_tests -m "not slow"
    ;;
*)
    pinned
    python -m pytest --durations=10 -m "not slow" "$@"
    ;;
esac

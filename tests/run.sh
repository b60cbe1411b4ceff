#!/usr/bin/env bash
# Lint, check types and test, in the pinned environment (launch/venv.sh makes it the first time). Arguments go to pytest.
#
#   bash tests/run.sh                       all but the slow tests
#   bash tests/run.sh --all                 the slow ones as well
#   bash tests/run.sh tests/test_plan.py    one file
#   VENV=/path/to/env bash tests/run.sh     another place for the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
select=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    select=()
    shift
    # The real model, when the quick start has fetched it.
    if [[ -z ${MINITRON_SMOLLM2:-} && -f out/quickstart/teacher_hf/config.json ]]; then export MINITRON_SMOLLM2=$PWD/out/quickstart/teacher_hf; fi
fi

bash launch/venv.sh "$venv"
export PATH=$venv/bin:$PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check
ruff format --check
mypy
# Two at a time: many tests wait, for a bound or for a process of their own.
parallel=()
(($#)) || parallel=(-n 2 --no-loadscope-reorder) # conftest.py says who takes what
python -m pytest --durations=10 "${select[@]}" "${parallel[@]}" "$@"

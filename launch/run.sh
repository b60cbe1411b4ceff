#!/usr/bin/env bash
# Run a minitron-mp command on the GPUs of this node, or on one node of a job of launch/slurm.sbatch.
#
#   bash launch/run.sh compress recipe.yaml parallel.tp=4          one rank per GPU
#   bash launch/run.sh --ranks 2 distill recipe.yaml               two ranks, also without GPUs
#   bash launch/run.sh --cpu data recipe.yaml parallel.tp=8        one process, for a stage that needs no GPU
#
# It uses the python on the PATH if minitron_mp is installed there, else the python of $VENV. VENV defaults
# to .venv in this checkout, which launch/venv.sh creates. Exit code 2 means an invalid recipe or argument.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")

fail() {
    echo "launch/run.sh: $*" >&2
    exit 2
}

# A file reports exit code 2 to launch/slurm.sbatch, because Slurm's exit code can come from another node
# that srun stopped.
trap '[[ $? != 2 || -z ${MINITRON_JOB_FILE:-} ]] || : >"$MINITRON_JOB_FILE.refused"' EXIT

ranks_per_node=
cpu=
while (($#)); do
    case $1 in
    --ranks)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--ranks needs a number, given ${2:-nothing}"
        ranks_per_node=$2
        shift 2
        ;;
    --cpu)
        cpu=yes
        shift
        ;;
    -h | --help)
        sed -n '2,9p' "$self"
        exit
        ;;
    *) break ;;
    esac
done
[[ $# -ge 2 ]] || fail "needs a command and a recipe: bash launch/run.sh compress recipe.yaml"
command=$1 recipe=$2
shift 2
overrides=()
for word in "$@"; do [[ $word == -* || $word != *=* ]] || overrides+=("$word"); done

has_minitron() {
    command -v python >/dev/null || return 1
    python -c 'from importlib.util import find_spec as f; assert f("minitron_mp") and f("torch")' 2>/dev/null
}
if ! has_minitron; then
    PATH=${VENV:-$root/.venv}/bin:$PATH
    has_minitron ||
        fail "no python with minitron_mp on the PATH or in ${VENV:-$root/.venv}; run bash launch/venv.sh"
fi

if [[ -n $cpu ]]; then # the layout of the recipe need not fit, and no rank needs its environment
    CUDA_VISIBLE_DEVICES='' exec python -m minitron_mp "$command" "$recipe" "$@"
fi

if [[ -z $ranks_per_node ]]; then
    ranks_per_node=${SLURM_GPUS_ON_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    [[ $ranks_per_node -ge 1 ]] || fail "no GPU found; give the number of CPU ranks: --ranks 2"
fi
num_nodes=1
join=(--standalone)
if [[ -n ${MINITRON_RENDEZVOUS:-} ]]; then # launch/slurm.sbatch runs this script on each node
    num_nodes=$SLURM_NNODES
    read -ra addresses <<<"$MINITRON_ADDRESSES"
    # The store's host and the node's address are given, because torchrun would guess them.
    join=(--nnodes "$num_nodes" --rdzv-backend c10d --rdzv-endpoint "$MINITRON_RENDEZVOUS"
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        --rdzv-conf "is_host=$((SLURM_NODEID == 0)),join_timeout=900"
        --local-addr "${addresses[SLURM_NODEID]}" --max-restarts 0)
fi
# shellcheck source=launch/env.sh
. "$root/launch/env.sh" "$recipe" "${overrides[@]}"
if [[ -n ${MINITRON_JOB_FILE:-} && ${SLURM_NODEID:-0} == 0 ]]; then
    printf '%s\n' "$MINITRON_OUTPUT" >"$MINITRON_JOB_FILE.output"
fi

exec python -m torch.distributed.run "${join[@]}" --nproc-per-node "$ranks_per_node" \
    -m minitron_mp "$command" "$recipe" "$@"

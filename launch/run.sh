#!/usr/bin/env bash
# Run a minitron-mp command on the GPUs of this node, or on one node of a job of launch/slurm.sbatch.
#
#   bash launch/run.sh compress recipe.yaml parallel.tp=4          one rank per GPU
#   bash launch/run.sh --ranks 2 distill recipe.yaml               two ranks, also without GPUs
#   bash launch/run.sh --cpu data recipe.yaml parallel.tp=8        one process, for a stage that needs no GPU
#   bash launch/run.sh --doctor compress recipe.yaml               only check this node
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
bad_node() { # not exit code 2, because another node may have what this one lacks
    echo "launch/run.sh: $*" >&2
    exit 1
}

# A file reports exit code 2 to launch/slurm.sbatch, because Slurm's exit code can come from another node
# that srun stopped.
trap '[[ $? != 2 || -z ${MINITRON_JOB_FILE:-} ]] || : >"$MINITRON_JOB_FILE.refused"' EXIT

ranks_per_node=
cpu=
doctor=
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
    --doctor)
        doctor=yes
        shift
        ;;
    -h | --help)
        sed -n '2,10p' "$self"
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

# Each node checks itself, so that a failure names a node. launch/slurm.sbatch reads the two files of a node.
# A node that cannot even start python is not healthy either, and does not end the job's chain.
healthy=/dev/null
if [[ -n $doctor && -n ${MINITRON_JOB_FILE:-} ]]; then
    healthy=$MINITRON_JOB_FILE.healthy-$SLURMD_NODENAME
    exec >"$MINITRON_JOB_FILE.doctor-$SLURMD_NODENAME" 2>&1
    unset MINITRON_JOB_FILE
fi

has_minitron() {
    command -v python >/dev/null || return 1
    python -c 'from importlib.util import find_spec as f; assert f("minitron_mp") and f("torch")' 2>/dev/null
}
if ! has_minitron; then
    PATH=${VENV:-$root/.venv}/bin:$PATH
    has_minitron ||
        bad_node "no python with minitron_mp on the PATH or in ${VENV:-$root/.venv}; run bash launch/venv.sh"
fi

if [[ -n $cpu ]]; then # the layout of the recipe need not fit, and no rank needs its environment
    CUDA_VISIBLE_DEVICES='' exec python -m minitron_mp "$command" "$recipe" "$@"
fi

if [[ -z $ranks_per_node ]]; then
    ranks_per_node=${SLURM_GPUS_ON_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    [[ $ranks_per_node -ge 1 ]] || bad_node "no GPU found; give the number of CPU ranks: --ranks 2"
fi

if [[ -n $doctor ]]; then
    # shellcheck source=launch/env.sh
    . "$root/launch/env.sh" --site
    timeout --kill-after=10 "${MINITRON_DOCTOR_S:-300}" python -m torch.distributed.run --rdzv-backend c10d \
        --rdzv-endpoint localhost:0 --local-addr 127.0.0.1 --nproc-per-node "$ranks_per_node" \
        -m minitron_mp doctor
    : >"$healthy"
    exit
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
        --local-addr "${addresses[SLURM_NODEID]}" --max-restarts "${MINITRON_RESTARTS:-0}")
    # Each start of the ranks has a new store. In the agents' store the keys of a start contain the number of
    # restarts of a node, which differs between the nodes.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# shellcheck source=launch/env.sh
. "$root/launch/env.sh" "$recipe" "${overrides[@]}"
if [[ -n ${MINITRON_JOB_FILE:-} && ${SLURM_NODEID:-0} == 0 ]]; then
    printf '%s\n' "$MINITRON_OUTPUT" >"$MINITRON_JOB_FILE.output"
fi

# Keep the logs of the newest starts. The time of a start's folder does not change while its job runs, so a
# folder in which anything has changed within a day also stays.
prune_logs() {
    local folder changed
    find "$log_root" -mindepth 1 -maxdepth 1 -type d -regextype posix-extended \
        -regex '.*/(job|run)-[0-9]+-[0-9]+' -printf '%T@ %p\0' |
        sort -z -rn | tail -z -n "+$((${MINITRON_KEEP_LOGS:-10} + 1))" | cut -z -d' ' -f2- |
        while IFS= read -r -d '' folder; do
            changed=$(find "$folder" -mmin -1440 -print -quit) || continue
            [[ -n $changed ]] || rm -rf "$folder"
        done
}

# Write the output of each rank to a file, and to this output with the rank before each line. On a terminal
# rank 0 writes to it directly, because its progress bar needs one.
streams=()
log_root=$MINITRON_OUTPUT/logs
start=run-$(date +%Y%m%d-%H%M%S)
[[ -z ${SLURM_JOB_ID:-} ]] || start=job-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
node=${SLURMD_NODENAME:-$(hostname)}
mkdir -p "$log_root" 2>/dev/null || true # also for the flight recorder; a rank reports the error
if [[ ${MINITRON_KEEP_LOGS:-10} != 0 ]] && mkdir -p "$log_root/$start/$node" 2>/dev/null; then
    tee=3
    if [[ -t 1 ]]; then
        tee=$(for ((rank = 1; rank < ranks_per_node; rank++)); do printf '%s:3,' "$rank"; done)
        tee=${tee%,}
    fi
    [[ -z $tee ]] || streams=(--log-dir "$log_root/$start/$node" --tee "$tee")
    # shellcheck disable=SC2016 # torchrun replaces it
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'rank ${rank}: '}
    if [[ ${SLURM_NODEID:-0} == 0 ]]; then prune_logs || true; fi # old logs are no reason not to start
fi

# Each rank runs on the cores and in the memory beside its GPU.
numa=()
sockets=(/sys/devices/system/node/node[0-9]*)
if [[ ${MINITRON_NUMA:-yes} != no && ${#sockets[@]} -gt 1 ]] && command -v numactl >/dev/null &&
    python -c 'import torch, torch.numa.binding; assert torch.cuda.device_count()' 2>/dev/null; then
    numa=(--numa-binding node)
fi

exec python -m torch.distributed.run "${join[@]}" "${streams[@]}" "${numa[@]}" \
    --nproc-per-node "$ranks_per_node" -m minitron_mp "$command" "$recipe" "$@"

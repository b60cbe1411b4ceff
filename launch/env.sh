#!/usr/bin/env bash
# The environment of the ranks of one node; to be sourced: . launch/env.sh RECIPE [key=value...]
#
# First what the site says (launch/site), then what the recipe asks for (minitron-mp environment), where it is not set yet. Prints the
# variables as they are in the end, with reasons, on the first node. Reads ranks_per_node and num_nodes, default 1.
#   . launch/env.sh --site      only what the site says

load_site() {
    local root site
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    site=${MINITRON_SITE:-local}
    [[ $site == */* ]] || site=$root/launch/site/$site.env
    if [[ -f $site ]]; then
        set -a
        # shellcheck source=launch/site/example.env
        . "$site"
        set +a
    elif [[ -n ${MINITRON_SITE:-} ]]; then
        echo "MINITRON_SITE=$MINITRON_SITE: there is no $site; copy launch/site/example.env" >&2
        return 2
    fi
}

# Needs python on the PATH with minitron_mp in it.
load_environment() {
    local lines line name
    lines=$(python -m minitron_mp environment "$@" --ranks "${ranks_per_node:-1}" --nodes "${num_nodes:-1}") || return 2
    unset MINITRON_OUTPUT
    while IFS= read -r line; do
        if [[ $line == export* ]]; then
            name=${line#export }
            name=${name%%=*}
            [[ -n ${!name+set} ]] || eval "$line"
            line="$name=${!name}  ${line#*  }"
        fi
        [[ ${SLURM_NODEID:-0} != 0 ]] || echo "$line"
    done <<<"$lines"
}

# shellcheck disable=SC2317 # exit: where this file is run, not sourced
if ! load_site || { [[ ${1:-} != --site ]] && ! load_environment "$@"; }; then
    return 2 2>/dev/null || exit 2
fi

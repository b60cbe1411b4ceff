#!/usr/bin/env bash
# Set the environment variables of the ranks of one node. Source it: . launch/env.sh RECIPE [key=value...]
#
# It reads the site's file (launch/site) first. Then it sets the variables that the recipe needs
# (minitron-mp environment), unless they are already set. On the first node it prints the final values with
# reasons. It reads the shell variables ranks_per_node and num_nodes, which default to 1.
#   . launch/env.sh --site      read only the site's file

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
        echo "MINITRON_SITE=$MINITRON_SITE: there is no $site; copy launch/site/example.env to it" >&2
        return 2
    fi
}

# This needs a python with minitron_mp on the PATH.
load_environment() {
    local lines line name
    lines=$(python -m minitron_mp environment "$@" --ranks "${ranks_per_node:-1}" \
        --nodes "${num_nodes:-1}") || return 2
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

# shellcheck disable=SC2317 # exit is reached if this file is executed instead of sourced
if ! load_site || { [[ ${1:-} != --site ]] && ! load_environment "$@"; }; then
    return 2 2>/dev/null || exit 2
fi

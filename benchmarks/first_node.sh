#!/usr/bin/env bash
# The first minutes on a node of 8 GPUs: what one GPU cannot show. Options as in first_gpu.sh.
#
#   bash benchmarks/first_node.sh                         results in out/first_node
#   bash benchmarks/first_node.sh --rehearse              4 gloo ranks on a CPU
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/first_run/main.py" node "$@"

#!/usr/bin/env bash
# The first 14 minutes on one GPU. The most informative stages come first, and each has a time limit.
# One JSON of results, first_gpu.json, from which benchmarks/first_run/publish.py writes the docs.
# Run it in a checkout of the repository, after `pip install '.[te]' pytest`, or in the Docker image with
# the checkout mounted. With liger-kernel installed, the loss is compared with it, too.
#
#   bash benchmarks/first_gpu.sh                          results in out/first_gpu
#   bash benchmarks/first_gpu.sh --output FOLDER --minutes 10
#   bash benchmarks/first_gpu.sh --only versions loss     some stages
#   bash benchmarks/first_gpu.sh --list                   the stages and what each one shows
#   bash benchmarks/first_gpu.sh --rehearse               end to end on a CPU at tiny sizes
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/first_run/main.py" gpu "$@"

#!/usr/bin/env bash
# Trains on all GPUs of this machine; a process that dies is begun again, up to three times, from the last checkpoint.
#
#   examples/launch/one_machine.sh --config large --run_dir runs/large
#   GPUS=2 examples/launch/one_machine.sh --config large --distributed.strategy fsdp
set -euo pipefail
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 -m bdh train "$@"

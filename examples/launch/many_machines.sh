#!/usr/bin/env bash
# Trains on several machines; start it on each of them with the same arguments. run_dir and the text must be on a disk that
# all of them share.
#
#   HEAD=gpu01:29400 MACHINES=4 examples/launch/many_machines.sh --config large --run_dir /shared/runs/large
#
# MACHINES may be a range, as 2:4: then the run begins with two, and begins again, from the last checkpoint, whenever one
# joins or is lost. training.batch_size stays what it is: it is shared by all processes there are.
set -euo pipefail
: "${HEAD:?the machine that the others meet at, as gpu01:29400}"
: "${MACHINES:?how many machines, as 4 or 2:4}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or processes that are begun again look for those that were there before
exec torchrun \
  --nnodes="$MACHINES" \
  --nproc-per-node="${GPUS:-gpu}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$HEAD" \
  --rdzv-id="${RUN_ID:-bdh}" \
  --max-restarts=3 \
  -m bdh train --resume auto "$@"

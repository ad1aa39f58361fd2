#!/usr/bin/env bash
# One node's share of a run over several nodes; start it on every node.
#   HEAD=node0 NODES=8 examples/cluster/torchrun.sh RUN.yaml [key.path=value ...]
# A node that fails ends the others' processes within train.hang_seconds; torchrun starts all again, up to RESTARTS times,
# from the last checkpoint.
set -euo pipefail
: "${HEAD:?the host where the processes meet}" "${NODES:?how many nodes there are}" "${1:?the run file}"
PORT=${PORT:-29400} GPUS=${GPUS:-8} RESTARTS=${RESTARTS:-3} ID=${ID:-mole_mega}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun with exit codes: 75 for a run that was told to stop and saved, where torchrun's own command ends with 1
exec python -m mole_mega.platform.launch --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$ID" \
  -m mole_mega.train "$@"

#!/usr/bin/env bash
# One node's share of a run over several nodes; start it on every node.
#   HEAD=node0 NODES=8 examples/llava15_7b/torchrun.sh [key.path=value ...]
# A node that fails takes the others down within minutes; torchrun starts all again, up to RESTARTS times, from the last
# checkpoint.
set -euo pipefail
: "${HEAD:?the host where the processes meet}" "${NODES:?how many nodes there are}"
PORT=${PORT:-29400} GPUS=${GPUS:-8} RESTARTS=${RESTARTS:-3} ID=${ID:-llava15_7b}
# torchrun 2.13 tells the meeting point of the first round only: a node that comes back would wait for it in vain
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$ID" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m mole_mega.train "$(dirname "$0")/run.yaml" "$@"

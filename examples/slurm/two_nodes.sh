#!/usr/bin/env bash
#SBATCH --job-name=two_level_mha
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00
# One torchrun on each node; it starts a rank for each GPU. First the cluster is checked, then the program runs:
#
#     sbatch examples/slurm/two_nodes.sh examples/train.py --grid 2x8
#
# Outside of Slurm, say on two machines by hand, the same command with these variables on each of them:
#     SLURM_NNODES=2 SLURM_NODEID=0 (1 on the other) MASTER_ADDR=first-machine RANKS_PER_NODE=8 examples/slurm/two_nodes.sh ..
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: two_nodes.sh PROGRAM ARGUMENTS"; exit 2; }

if [ -z "${SLURM_NODEID:-}" ] || { [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; }; then
  # in the batch script itself: this script again, as one task on each node
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  exec srun "$0" "$@"
fi

RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
ranks() {
  local port=$1
  shift
  torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$port" "$@"
}

# shellcheck disable=SC2086  # CHECK_ARGUMENTS is a list of words
ranks "${MASTER_PORT:-29500}" -m two_level_mha check ${CHECK_ARGUMENTS:-}
ranks "$((${MASTER_PORT:-29500} + 1))" "$@"

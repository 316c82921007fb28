#!/bin/bash
# A job on N nodes with 8 GPUs each, one process a GPU:
#   sbatch --nodes=2 scripts/slurm.sh configs/fusellm-7b.yaml mesh.data=2 mesh.fsdp=8 [key=value ...]
# CONFIG's `output` should be on storage that all nodes share. A preempted job (exit status 75) is queued again, and goes
# on where it stopped.
#SBATCH --job-name=fusejax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --output=slurm-%j.out
set -uo pipefail

[ $# -ge 1 ] || { echo "error: name a configuration: sbatch $0 CONFIG.yaml [key=value ...]" >&2; exit 2; }
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))"
export JAX_NUM_PROCESSES="$SLURM_NTASKS"

# Each task takes its own number and the GPU of its place on the node.
srun --kill-on-bad-exit=0 bash -c '
  export JAX_PROCESS_ID="$SLURM_PROCID" JAX_LOCAL_DEVICE_IDS="$SLURM_LOCALID"
  exec python train.py "$@"' train "$@" &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$step"; status=$?
# A trapped signal ends the first wait early.
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"

#!/bin/bash
# A job on N nodes with 8 GPUs each, one process a GPU:
#   sbatch --nodes=2 scripts/slurm.sh configs/fusellm-7b.yaml mesh.data=2 mesh.fsdp=8 [key=value ...]
# CONFIG's `output` should be on storage that all nodes share. The job is queued again, and goes on where it stopped: by
# Slurm where it is preempted or a node fails (--requeue); by this script where its time is up, and, in the job's first
# 10 restarts, where a process was lost (exit status 75) or killed (above 128). After a mistake or an error it is not.
#SBATCH --job-name=fusejax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
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
save() { scancel --signal=TERM "$SLURM_JOB_ID.0"; }
came=none
trap 'came=time; save' USR1
trap 'came=end; save' TERM # preempted, and Slurm queues it again, or cancelled, and nobody should
wait "$step"; status=$?
# A trapped signal ends a wait early.
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done
case "$came $status" in
  "time 75") scontrol requeue "$SLURM_JOB_ID" ;;
  "none 75" | "none 1"[2-9]? | "none 2"??)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit "$status"

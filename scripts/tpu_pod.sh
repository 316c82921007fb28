#!/bin/bash
# A job on all hosts of a Cloud TPU VM slice, from a machine with gcloud:
#   TPU=my-v5p-16 ZONE=us-east5-a scripts/tpu_pod.sh configs/fusellm-7b.yaml output=/shared/run mesh.fsdp=8
# Each host needs this repository with `make quickstart`'s .venv (with jax[tpu]) in the same place, FOLDER (default
# ~/fusejax), and `output` should be on storage that all of them see: a mounted Filestore or bucket.
set -euo pipefail

[ $# -ge 1 ] || { echo "error: name a configuration: TPU=NAME ZONE=ZONE $0 CONFIG.yaml [key=value ...]" >&2; exit 2; }
: "${TPU:?error: set TPU to the name of the TPU VM}" "${ZONE:?error: set ZONE to its zone}"
FOLDER=${FOLDER:-'~/fusejax'}

arguments=$(printf ' %q' "$@")
# TPU VMs know their number and their neighbours from the metadata server; on GKE the variables are there already.
remote='
  ask() { curl -sf -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }
  export TPU_WORKER_ID=${TPU_WORKER_ID:-$(ask agent-worker-number)}
  export TPU_WORKER_HOSTNAMES=${TPU_WORKER_HOSTNAMES:-$(ask worker-network-endpoints | tr "," "\n" | cut -d: -f3 | paste -sd,)}
  cd '"$FOLDER"' && exec .venv/bin/python train.py'"$arguments"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$remote"

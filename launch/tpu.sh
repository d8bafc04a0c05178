#!/usr/bin/env bash
# Train on a Cloud TPU slice, through a queued resource: bash launch/tpu.sh create | setup | train | delete
# jax.distributed finds the hosts of the slice by itself. The workdir is in a bucket; the data are on a file system
# that all of them mount (Filestore).
set -euo pipefail

# Edit 1: the slice
NAME=yolos
ZONE=us-west4-a
TYPE=v5litepod-16
RUNTIME=v2-alpha-tpuv5-lite
FILESTORE=10.0.0.2:/share
# Edit 2: what to train
TRAIN='--config=configs/yolos_ti.py --workdir=gs://BUCKET/runs/ti --config.data=/mnt/share/coco --config.batch_size=16'

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
    ;;
  setup)
    tar czf /tmp/yolos_jax.tgz --exclude=.venv --exclude=.git --exclude=runs .
    gcloud compute tpus tpu-vm scp /tmp/yolos_jax.tgz "$NAME": --zone="$ZONE" --worker=all
    everywhere "mkdir -p yolos_jax && tar xzf yolos_jax.tgz -C yolos_jax && cd yolos_jax \
      && python3.11 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]' \
      && sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/share && sudo mount $FILESTORE /mnt/share"
    ;;
  train)
    everywhere "cd yolos_jax && .venv/bin/python train.py $TRAIN"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
    ;;
  *)
    echo "usage: bash launch/tpu.sh create | setup | train | delete" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# Train on a Cloud TPU slice, through a queued resource: bash launch/tpu.sh create | setup | train | delete
# jax.distributed finds the hosts of the slice by itself. The data and the workdir are in a bucket.
set -euo pipefail

# Edit 1: the slice
NAME=yolos
ZONE=us-west4-a
TYPE=v5litepod-16
RUNTIME=v2-alpha-tpuv5-lite
# Edit 2: what to train
TRAIN='--config=configs/yolos_ti.py --workdir=gs://BUCKET/runs/ti --config.data=gs://BUCKET/coco --config.batch_size=16 --config.init_from=gs://BUCKET/deit_tiny_patch16_224-a1311bcf.pth'

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
      && pip install -q --user uv && ~/.local/bin/uv venv -q --python 3.12 --seed .venv \
      && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
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

#!/usr/bin/env bash
# Train on machines that you reach by ssh: the same checkout at the same path on each, and a workdir that
# all of them see (NFS, say). Run it on any machine; Ctrl-C asks the run to save and stop.
set -euo pipefail
((BASH_VERSINFO[0] >= 5)) || { echo 'this script needs bash 5 (wait -n)' >&2; exit 2; }

# Edit 1: the machines; the first one coordinates
HOSTS=(host0 host1)
# Edit 2: what to train
TRAIN=(--config=configs/yolos_ti.py --workdir=/shared/runs/ti --config.data=/data/coco --config.batch_size=16
  --config.init_from=/data/deit_tiny_patch16_224-a1311bcf.pth)

PORT=9731
RUN="/tmp/yolos-$(hostname)-$$" # on every machine: a file with the id of the process started there
TRAIN_QUOTED=$(printf '%q ' "${TRAIN[@]}") HERE=$(printf '%q' "$PWD")
pids=()
for i in "${!HOSTS[@]}"; do
  # -tt: the process ends with its connection; TERM=dumb: lines, and no progress bar, which sed would hold back
  (TERM=dumb ssh -tt "${HOSTS[$i]}" "cd $HERE && echo \$\$ > $RUN-$i && exec .venv/bin/python train.py $TRAIN_QUOTED\
    --coordinator=${HOSTS[0]#*@}:$PORT --num_processes=${#HOSTS[@]} --process_id=$i" < /dev/null 2>&1 | sed -u -e $'s/\r$//' -e "s/^/[$i] /") &
  pids+=($!)
done
stop() { for i in "${!HOSTS[@]}"; do ssh "${HOSTS[$i]}" "kill -TERM \$(cat $RUN-$i)" || true; done; }
trap stop INT TERM
while jobs -pr | grep -q .; do
  code=0
  wait -n || code=$?
  # one process failed, perhaps before the others knew of it, or ssh did (255); a signal (128 and more) reaches all
  if (((code > 0 && code < 128) || code == 255)); then stop; fi
done
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if ((code > status)); then status=$code; fi
done
for i in "${!HOSTS[@]}"; do ssh "${HOSTS[$i]}" "rm -f $RUN-$i"; done
exit $status

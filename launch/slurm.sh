#!/usr/bin/env bash
# Train under Slurm, one process per GPU: sbatch launch/slurm.sh
# jax.distributed finds the others by Slurm's variables. Two minutes before its time is up Slurm sends SIGTERM:
# the run saves and stops. Submit the file as often as the training needs; the jobs run one after the other, and
# each resumes where the last one stopped.

# Edit 1: the machines
#SBATCH --job-name=yolos
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail

# Edit 2: what to train; all nodes must see the workdir
TRAIN=(--config=configs/yolos_ti.py --workdir="$HOME/runs/ti" --config.data=/data/coco --config.batch_size=16
  --config.init_from=/data/deit_tiny_patch16_224-a1311bcf.pth)

status=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 .venv/bin/python train.py "${TRAIN[@]}" || status=$?
# a run that diverged would end the same again: the jobs that wait for this one are not needed
[ "$status" != 3 ] || scancel --name="$SLURM_JOB_NAME" --user="$USER" --state=PENDING
exit "$status"

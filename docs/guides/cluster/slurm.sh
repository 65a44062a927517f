#!/usr/bin/env bash
# Trains on several nodes, one process a GPU, from the root of the checkout:
#   sbatch docs/guides/cluster/slurm.sh
# Started again, by hand or by Slurm, it goes on from the newest checkpoint.
#SBATCH --job-name=lensjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RUN=${RUN:-runs/slurm} # on a file system that all nodes see
PYTHON=${PYTHON:-.venv/bin/python}

# Where the first process listens; who is which of how many, and which GPU is whose, JAX reads of Slurm's own variables.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export JAX_COORDINATOR_ADDRESS="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"

words=(stdlib --batch-size 64 --pretrain.batch-size 64 --output-dir "$RUN")
if [ -f "$RUN/config.json" ]; then
    words=(--resume "$RUN")
fi
status=0
srun --kill-on-bad-exit=1 "$PYTHON" -m experiments.train "${words[@]}" || status=$?
# 143: the time is up, and the run has been saved.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

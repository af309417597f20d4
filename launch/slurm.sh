#!/bin/bash
# Trains on several machines under SLURM: one process per GPU, which JAX finds by itself.
#
#   sbatch --nodes=2 launch/slurm.sh launch/train.py --config configs/ti2t/llava_dpo.py \
#       --workdir /shared/runs/dpo --config.model.path=... --config.data.path=...
#
# The run directory must be on a file system that all machines share. Before the time limit, and
# before a preemption, SLURM sends SIGTERM: the run saves a checkpoint at the next step, stops, and
# the job is queued again, to continue there.
#SBATCH --job-name=aa_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch launch/slurm.sh launch/train.py --config ... --workdir ..." >&2
    exit 2
fi

export AA_JAX_HOSTS=auto
# A machine that fails takes its processes with it: srun then ends the others at once.
srun --kill-on-bad-exit=1 --label "${PYTHON:-python3}" "$@" &
step=$!
# The batch script itself must survive the signal to queue the job again. A signal ends `wait`, so
# it is called until the step has ended.
told=0
trap 'told=1' TERM
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

# 143: stopped by SIGTERM with a checkpoint. 75: another process was lost.
if [ "$code" -eq 143 ] || [ "$code" -eq 75 ] || [ "$told" -eq 1 ]; then
    if [ "$code" -ne 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        echo "stopped with exit code $code: queueing job $SLURM_JOB_ID again" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"

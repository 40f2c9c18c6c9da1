#!/bin/bash

# Parameters
#SBATCH --array=0-599%256
#SBATCH --chdir='/home/me/my project'
#SBATCH --cpus-per-task=4
#SBATCH --error=/arrays/shards/launch/logs/%A_%a_0_log.err
#SBATCH --job-name=vitscale-shards
#SBATCH --mem=8000M
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/arrays/shards/launch/logs/%A_%a_0_log.out
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --wckey=submitit

# setup
trap : INT TERM USR1 USR2
unset RANK WORLD_SIZE LOCAL_RANK GROUP_RANK MASTER_ADDR MASTER_PORT
export PYTHONPATH=/arrays/shards/launch/code${PYTHONPATH:+:$PYTHONPATH}
run=/arrays/shards/tasks/"$(printf %05d "${SLURM_ARRAY_TASK_ID:-0}")"
prepared="$(/venv/bin/python -P -m vitscale_launch.before "$run")" || exit $?
eval "$prepared"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /arrays/shards/launch/logs/%A_%a_%t_log.out --error /arrays/shards/launch/logs/%A_%a_%t_log.err --kill-on-bad-exit=1 /venv/bin/python -P -u -m submitit.core._submit /arrays/shards/launch/logs


# teardown
status=$?
/venv/bin/python -P -m vitscale_launch.after "$run" "$status"
exit "$status"
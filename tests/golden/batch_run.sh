#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --chdir='/home/me/my project'
#SBATCH --constraint=nvlink
#SBATCH --error='/runs/first run/launch/logs/%j_0_log.err'
#SBATCH --exclude=gpu3,gpu7
#SBATCH --exclusive
#SBATCH --gpus-per-node=h100:8
#SBATCH --job-name=vitscale-first_run
#SBATCH --mail-type=END
#SBATCH --mem=0
#SBATCH --mincpus=96
#SBATCH --nodes=2-8
#SBATCH --open-mode=append
#SBATCH --output='/runs/first run/launch/logs/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation='week 47'
#SBATCH --signal=USR2@300
#SBATCH --spread-job
#SBATCH --time=600
#SBATCH --wckey=submitit

# setup
trap : INT TERM USR1 USR2
unset RANK WORLD_SIZE LOCAL_RANK GROUP_RANK MASTER_ADDR MASTER_PORT
module load cuda/12.8 || { echo 'vitscale: error: module load cuda/12.8 failed; mend modules in the site profile' >&2; exit 2; }
export NCCL_IB_HCA=mlx5
export NOTE='it'"'"'s'
ulimit -n 65536
export PYTHONPATH='/runs/first run/launch/code'${PYTHONPATH:+:$PYTHONPATH}
run='/runs/first run'
export PYTHONSAFEPATH=1
prepared="$(/venv/bin/python -P -m vitscale_launch.before "$run")" || exit $?
eval "$prepared"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/first run/launch/logs/%j_%t_log.out' --error '/runs/first run/launch/logs/%j_%t_log.err' --kill-on-bad-exit=1 /venv/bin/python -P -u -m submitit.core._submit '/runs/first run/launch/logs'


# teardown
status=$?
/venv/bin/python -P -m vitscale_launch.after "$run" "$status"
exit "$status"
#!/bin/bash
# Trains on the nodes of a SLURM job; arguments are torchrun's: the program and its own, which resume a job that is
# queued again:
#
#   sbatch --nodes 2 tools/slurm.sh tools/lazyconfig_train_net.py --config-file CONFIG.py train.output_dir=DIR --resume
#   sbatch --nodes 2 tools/slurm.sh -m llava_piip.train.train PRESET --output_dir DIR --resume true
#
# Submit it from the root of the repository, in the environment in which the package is installed.
#SBATCH --job-name=piip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export MASTER_ADDR MASTER_PORT NNODES NPROC_PER_NODE
# Read whole before the first is taken: a `head` that closes the pipe early would end the job through pipefail
HOSTNAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${HOSTNAMES%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
NNODES=$SLURM_JOB_NUM_NODES
NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}

# One task per node, which starts a process per GPU
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun --nnodes "$NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$NPROC_PER_NODE" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
' bash "$@"

#!/usr/bin/env bash
# Ministral 3 8B on two nodes of eight GPUs: TP 2 × data parallel 8.
#   sbatch examples/slurm_8b.sh TRAIN.jsonl BEIR_FOLDER [section.key=value …]
# The model must be in the Hugging Face cache of every node, or be named by model.hf_model=FOLDER on a shared disk.
#SBATCH --job-name=ministral3-8b-embed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
set -euo pipefail
train=$1 eval=$2
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4

# The same command after an interruption continues from the last checkpoint.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m megatron_embed.recipes.train ministral3_8b_embed_config \
    data.train="$train" data.eval="$eval" train.global_batch_size=512 train.train_iters=2000 \
    train.save_dir="runs/ministral3_8b-$SLURM_JOB_NAME" "$@"

convert-checkpoints export --megatron-path "runs/ministral3_8b-$SLURM_JOB_NAME" --hf-path "runs/ministral3_8b-embedder"

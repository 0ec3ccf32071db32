#!/usr/bin/env bash
# The real job in three commands: import, train, export.
#   examples/quickstart.sh MODEL_FOLDER TRAIN.jsonl OUT [section.key=value …]
# From the environment: PROCESSES (default 1), RECIPE (default: the tiny one, which runs on a laptop), PYTHON.
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$python" "$root/conversion/convert_checkpoints.py" import --hf-model "$model" --megatron-path "$out/megatron"

"$python" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-1}" \
    -m megatron_embed.recipes.train "${RECIPE:-ministral3_tiny_embed_config}" \
    model.hf_model="$model" checkpoint.pretrained_checkpoint="$out/megatron" \
    data.train="$data" train.save_dir="$out/run" "$@"

"$python" "$root/conversion/convert_checkpoints.py" export --megatron-path "$out/run" --hf-path "$out/embedder"

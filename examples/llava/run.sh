#!/usr/bin/env bash
# From a checkpoint and a store to a checkpoint that transformers loads: some minutes on two cores.
#
#     examples/llava/run.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python "$here/make.py" "$1"
cd "$1"

mimogrid init checkpoint --out job.toml
mimogrid data index train.json --processor checkpoint --media images

# The tower on two data-parallel ranks, the language model on two pipeline stages: four processes.
mimogrid train job.toml \
  --set modules.vision.grid.dp=2 --set modules.language.grid.pp=2 \
  --set 'data={ source = "conversations", options = { index = "train.index" } }' \
  --set 'batch={ global_size = 64, microbatches = 4 }' \
  --set 'optimizer={ lr = 3e-3, betas = [0.9, 0.98], weight_decay = 0.3, warmup_steps = 100, decay = "cosine" }' \
  --set 'train={ steps = 1500, run_dir = "run" }'

mimogrid export run --to hf tuned
python "$here/answer.py" tuned held_out.json

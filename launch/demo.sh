#!/usr/bin/env bash
# The whole job in small, on one machine without a GPU: raw English and Chinese text to an extended-context checkpoint
# that transformers opens. The last line printed is one JSON object with the figures.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/demo
processes=4
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$cores

step() { # number, what
  printf '\n[%s/8] %s (%d min %02d s so far)\n' "$1" "$2" $((SECONDS / 60)) $((SECONDS % 60))
}

step 1 "Environment"
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

step 2 "Fetch English and Chinese text"
python -m data fetch

step 3 "Clean, deduplicate, tokenise"
python -m data build
python -m data report

step 4 "Train: pretraining, then two context extensions, on $processes processes"
# Never more threads than cores in all.
OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1)) torchrun --standalone --nproc-per-node "$processes" -m train experiment=demo

step 5 "Evaluate on held-out documents"
python -m train.evaluate "$run"

step 6 "Export to a Hugging Face folder"
python -m train.export "$run" --replace --check

step 7 "Continue a prompt in each language"
python -m train.generate "$run/export" --prompt "It was a bright morning, and"
python -m train.generate "$run/export" --prompt "却说那日"

step 8 "Report"
python -m train.report "$run"

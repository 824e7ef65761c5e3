#!/usr/bin/env bash
# The whole main job on a laptop: import, evaluate, convert by on-policy distillation, evaluate, export.
#   make quickstart            (or: PATH=.venv/bin:$PATH bash examples/tiny/quickstart.sh)
# Writes runs/quickstart/, replacing an earlier one: summary.json, metrics.jsonl, report.png, hf/.
# Arguments go to the training run (--num-rollouts 20 for a quick look); QUICKSTART_RUN and
# MAX_EXAMPLES choose another run folder and fewer problems to evaluate on.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
run="${QUICKSTART_RUN:-runs/quickstart}"
max_examples="${MAX_EXAMPLES:-500}"
max_before=$((max_examples < 200 ? max_examples : 200))  # noise takes long to decode
started=$(date +%s)

say() { printf '\n\033[1m[%4ds] %s\033[0m\n' "$(($(date +%s) - started))" "$*"; }
evaluate() {  # evaluate <checkpoint> <problems> <settings> <output>
  torchrun --nproc-per-node 2 tools/evaluate.py --load "$1" --data "$run/data/heldout.jsonl" \
    --max-examples "$2" --block-size 4 --max-response-length 40 --settings "$3" --output "$4"
}

if [[ -e "$run" && ! -d "$run/data" ]]; then
  echo "error: QUICKSTART_RUN = '$run': exists and is no quickstart run; name a new folder" >&2
  exit 2
fi
rm -rf "$run"
mkdir -p "$run"

say "Generating problems: prompts to train on, and held-out ones"
python examples/tiny/build_data.py --output "$run/data" --only prompts.jsonl heldout.jsonl

say "Importing the autoregressive model into a Megatron checkpoint"
python tools/convert_checkpoint.py --load examples/tiny/qwen3 --save "$run/teacher" --target-format megatron

say "Evaluating it: autoregressively, then as a block-diffusion model that it is not yet"
evaluate "$run/teacher" "$max_before" autoregressive,static,dynamic:0.9,dynamic:0.7 "$run/before.json"

say "Converting it by on-policy distillation on 2 processes"
torchrun --nproc-per-node 2 pretrain_opdlm.py --config examples/tiny/opdlm.yaml \
  --load "$run/teacher" --teacher-load "$run/teacher" --prompts "$run/data/prompts.jsonl" --save "$run" \
  --eval-prompts "$run/data/heldout.jsonl" --eval-prompts-interval 320 --eval-num-prompts 50 \
  --eval-decodings dynamic:0.9 --eval-temperature 0 "$@"

say "Evaluating the converted model"
evaluate "$run" "$max_examples" static,dynamic:0.9,dynamic:0.7 "$run/after.json"

say "Exporting it to Hugging Face format"
python tools/convert_checkpoint.py --load "$run" --save "$run/hf" --target-format sdar \
  --scores "$run/after.json"

say "Generating one answer with plain transformers"
python examples/tiny/generate_with_transformers.py "$run/hf" "$run/data/heldout.jsonl"

python examples/tiny/report.py "$run" --wall-seconds "$(($(date +%s) - started))"

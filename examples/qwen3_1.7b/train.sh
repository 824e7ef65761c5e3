#!/usr/bin/env bash
# Convert Qwen3-1.7B on one node of 8 GPUs; paths come from the environment (examples/launch.sh).
#
#   MODEL=models/Qwen3-1.7B PROMPTS=prompts.jsonl bash examples/qwen3_1.7b/train.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/opdlm.yaml" "$@"

#!/usr/bin/env bash
# Convert Qwen3-30B-A3B on one node of 8 GPUs; paths come from the environment (examples/launch.sh).
#
#   MODEL=models/Qwen3-30B-A3B PROMPTS=prompts.jsonl bash examples/qwen3_30b_a3b/train.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/opdlm.yaml" "$@"

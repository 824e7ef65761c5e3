#!/usr/bin/env bash
# Convert Qwen3-8B on one node of 8 GPUs; paths come from the environment (examples/launch.sh).
#
#   MODEL=models/Qwen3-8B PROMPTS=prompts.jsonl bash examples/qwen3_8b/train.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/opdlm.yaml" "$@"

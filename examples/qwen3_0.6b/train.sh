#!/usr/bin/env bash
# Convert Qwen3-0.6B on one node of 8 GPUs; paths come from the environment (examples/launch.sh).
#
#   MODEL=models/Qwen3-0.6B PROMPTS=prompts.jsonl bash examples/qwen3_0.6b/train.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/opdlm.yaml" "$@"

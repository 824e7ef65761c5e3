#!/usr/bin/env bash
# Train Qwen3-0.6B on a node of 8 GPUs, by opdlm.yaml or another RECIPE of this folder; paths come
# from the environment (examples/launch.sh).
#
#   MODEL=models/Qwen3-0.6B PROMPTS=prompts.jsonl bash examples/qwen3_0.6b/train.sh
#   RECIPE=opdlm_ours.yaml bash examples/qwen3_0.6b/train.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec bash "$here/../launch.sh" "$here/${RECIPE:-opdlm.yaml}" "$@"

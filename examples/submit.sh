#!/usr/bin/env bash
# Submit the training of one configuration to Slurm, from the repository's root.
#
#   GPU=b200 NODES=8 MODEL=models/Qwen3-30B-A3B PROMPTS=prompts.jsonl \
#       bash examples/submit.sh examples/qwen3_30b_a3b/opdlm_64_gpus.yaml [flags of pretrain_opdlm.py]
#
# Environment, beside that of launch.sh:
#   GPU             kind of GPU: h100, h200, b200, b300 (8 a node), gb200, gb300 (4 a node) (b200)
#   NODES           nodes (1)
#   GPUS_PER_NODE   of nodes that have another number of them
#   SEGMENT         nodes that have to share an NVLink domain; an NVL72 rack has 18 (--segment)
#   SBATCH_OPTIONS  further options, as "--test-only --qos high"; sbatch itself reads
#                   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and others
set -euo pipefail
if [[ ! -f examples/train.slurm ]]; then
    echo "error: PWD = '$PWD': is not the repository's root; change into it" >&2
    exit 2
fi
source examples/node.sh
if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "error: ${1:-no configuration}: not a file; use: $0 CONFIG.yaml [flags]" >&2
    exit 2
fi
GPU=${GPU:-b200}
NODES=${NODES:-1}
check_choice GPU h100 h200 b200 b300 gb200 gb300
check_number NODES 1 100000
case $GPU in
    gb*) of_kind=4 ;; # a tray of two boards, each a Grace and two Blackwell GPUs
    *) of_kind=8 ;;
esac
GPUS_PER_NODE=${GPUS_PER_NODE:-$of_kind}
check_number GPUS_PER_NODE 1 1000
command -v sbatch >/dev/null ||
    bad_value PATH "has no sbatch" "submit from a node of a Slurm cluster, or use examples/launch.sh"

folder=$(basename "$(dirname "$1")")
options=(--job-name "$folder-$(basename "$1" .yaml)" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE")
if [[ -n ${SEGMENT:-} ]]; then
    check_number SEGMENT 1 "$NODES"
    ((NODES % SEGMENT == 0)) ||
        bad_value SEGMENT "does not divide NODES = $NODES" "choose one that does"
    options+=(--segment "$SEGMENT")
fi
read -ra further <<<"${SBATCH_OPTIONS:-}"
exec sbatch "${options[@]}" "${further[@]}" examples/train.slurm "$@"

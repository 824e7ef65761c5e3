#!/usr/bin/env bash
# Train one configuration under torchrun, on one node or several.
#
#   bash examples/launch.sh examples/qwen3_8b/opdlm.yaml [flags of pretrain_opdlm.py]
#
# The same command again goes on from the run folder's newest checkpoint. TERM, INT, USR1 and USR2
# make the run save and stop. Exit status: 0 finished, 75 stopped and saved, 3 training diverged,
# 2 or 1 an error. Environment, all optional; what is unset is taken from the configuration file:
#   MODEL           Hugging Face folder of the model (--load, and the teacher where neither TEACHER
#                   nor the configuration names another)
#   TEACHER         Hugging Face folder of the teacher (--teacher-load)
#   PROMPTS         prompts (--prompts)
#   DATA_PATH       corpus (--data-path)
#   VALID_DATA_PATH held-out corpus (--valid-data-path)
#   SAVE            run folder (--save); on several nodes a folder that all of them see
#   NUM_ROLLOUTS    length of the run (--num-rollouts, in place of --num-epochs)
#   NPROC_PER_NODE  processes a node, one a GPU (8)
#   MAX_RESTARTS    how often all processes start again after one of them died (3)
#   SAVE_SECONDS    time to save after a signal, before torchrun kills the processes (270)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   as torchrun's (1, 0, 127.0.0.1, 29500)
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "error: ${1:-no configuration}: not a file; use: $0 CONFIG.yaml [flags]" >&2
    exit 2
fi
config=$1
shift
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

flags=(--config "$config")
[[ -z ${MODEL:-} ]] || flags+=(--load "$MODEL")
[[ -z ${TEACHER:-} ]] || flags+=(--teacher-load "$TEACHER")
[[ -z ${PROMPTS:-} ]] || flags+=(--prompts "$PROMPTS")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data-path "$DATA_PATH")
[[ -z ${VALID_DATA_PATH:-} ]] || flags+=(--valid-data-path "$VALID_DATA_PATH")
[[ -z ${SAVE:-} ]] || flags+=(--save "$SAVE")
[[ -z ${NUM_ROLLOUTS:-} ]] || flags+=(--num-rollouts "$NUM_ROLLOUTS" --num-epochs none)

# One CUDA queue keeps tensor-parallel communication in the order in which it was issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Packed rows differ in length, which fragments a caching allocator of fixed segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# torchrun hands these signals to its processes, and leaves them time to save before it kills them.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export PET_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-270}

source "$repository/examples/pass_signals.sh"
# torchrun ends with 1 whatever its processes ended with: they leave that in a file.
MEGATRON_DLM_STATUS_FILE=$(mktemp)
export MEGATRON_DLM_STATUS_FILE
trap 'rm -f "$MEGATRON_DLM_STATUS_FILE"' EXIT
status=0
PASS_AS=TERM pass_signals torchrun \
    --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --nproc-per-node "${NPROC_PER_NODE:-8}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    "$repository/pretrain_opdlm.py" "${flags[@]}" "$@" || status=$?
if ((status)) && [[ -s $MEGATRON_DLM_STATUS_FILE ]]; then
    status=$(<"$MEGATRON_DLM_STATUS_FILE")
fi
exit "$status"

#!/usr/bin/env bash
# Train one configuration under torchrun: this command, on each node.
#
#   bash examples/launch.sh examples/qwen3_8b/opdlm.yaml [flags of pretrain_opdlm.py]
#   NNODES=2 MASTER_ADDR=node1 bash examples/launch.sh examples/qwen3_8b/opdlm.yaml
#
# The same command again goes on from the run folder's newest checkpoint. TERM, INT, USR1 and USR2
# make the run save and stop. Exit status: 0 finished, 75 stopped and saved, 3 training diverged,
# 2 or 1 an error. Environment, all optional; docs/launching.md says more. Of the run; what is unset
# is taken from the configuration file:
#   MODEL           Hugging Face folder of the model (--load, and the teacher where neither TEACHER
#                   nor the configuration names another)
#   TEACHER         Hugging Face folder of the teacher (--teacher-load)
#   PROMPTS         prompts (--prompts)
#   DATA_PATH       corpus (--data-path)
#   VALID_DATA_PATH held-out corpus (--valid-data-path)
#   SAVE            run folder (--save); on several nodes a folder that all of them see
#   NUM_ROLLOUTS    length of the run (--num-rollouts, in place of --num-epochs)
# Of the nodes, the same on all of them but NODE_RANK, LOCAL_ADDR and what a node lacks or has:
#   NPROC_PER_NODE  processes of this node, one a GPU (the GPUs that it has)
#   NNODES          nodes (1)
#   MASTER_ADDR     where the nodes meet: name or address of one of them
#   MASTER_PORT     and its port (29500; of one node any that is free)
#   NODE_RANK       number of this node, 0 at MASTER_ADDR (SLURM_NODEID)
#   LOCAL_ADDR      address that the others reach this node at (that of its name)
#   SOCKET_IFNAME   network interfaces of NCCL's and gloo's sockets, such as eth0 (what they choose)
#   RDZV_BACKEND    c10d, or static, which numbers the ranks by NODE_RANK (c10d)
#   RUN_ID          name of this start, so that another one at the same port is not joined (train)
#   JOIN_SECONDS    time that nodes wait for each other (600)
#   MAX_RESTARTS    how often all processes start again after one of them died (3)
#   SAVE_SECONDS    time to save after a signal, before torchrun kills the processes (270)
#   LOG_DIR         folder of a log for each rank; the terminal then shows rank 0, and errors
# Of the software:
#   SETUP_SCRIPT    file that is sourced first (module load, exports)
#   VENV            virtual environment
#   CONTAINER_IMAGE    image that all this runs in
#   CONTAINER_MOUNTS   further folders in it: /data:/data,...
#   CONTAINER_RUNTIME  docker or podman (docker)
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/examples/node.sh"

if [[ $# -lt 1 || ! -f $1 ]]; then
    echo "error: ${1:-no configuration}: not a file; use: $0 CONFIG.yaml [flags]" >&2
    exit 2
fi

if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-docker}
    check_choice CONTAINER_RUNTIME docker podman
    command -v "$CONTAINER_RUNTIME" >/dev/null ||
        bad_value CONTAINER_RUNTIME "is not installed on $(uname -n)" "install it, or unset CONTAINER_IMAGE"
    source "$repository/examples/container.sh"
    in_container "$repository" bash "$repository/examples/launch.sh" "$@"
fi

if [[ -n ${SETUP_SCRIPT:-} ]]; then
    [[ -f $SETUP_SCRIPT ]] || bad_value SETUP_SCRIPT "is no file on $(uname -n)" "name one, or unset it"
    set +u # what others write may read variables that are not set
    # shellcheck disable=SC1090 # the user's
    source "$SETUP_SCRIPT"
    set -u
fi
if [[ -n ${VENV:-} ]]; then
    [[ -f $VENV/bin/activate ]] ||
        bad_value VENV "is no virtual environment on $(uname -n)" "name its folder, or unset it"
    set +u
    # shellcheck disable=SC1091 # the user's
    source "$VENV/bin/activate"
    set -u
fi
command -v torchrun >/dev/null ||
    bad_value PATH "has no torchrun" "name a virtual environment with VENV, or a container with CONTAINER_IMAGE"

config=$1
shift
flags=(--config "$config")
[[ -z ${MODEL:-} ]] || flags+=(--load "$MODEL")
[[ -z ${TEACHER:-} ]] || flags+=(--teacher-load "$TEACHER")
[[ -z ${PROMPTS:-} ]] || flags+=(--prompts "$PROMPTS")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data-path "$DATA_PATH")
[[ -z ${VALID_DATA_PATH:-} ]] || flags+=(--valid-data-path "$VALID_DATA_PATH")
[[ -z ${SAVE:-} ]] || flags+=(--save "$SAVE")
[[ -z ${NUM_ROLLOUTS:-} ]] || flags+=(--num-rollouts "$NUM_ROLLOUTS" --num-epochs none)

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
RDZV_BACKEND=${RDZV_BACKEND:-c10d}
MAX_RESTARTS=${MAX_RESTARTS:-3}
JOIN_SECONDS=${JOIN_SECONDS:-600}
SAVE_SECONDS=${SAVE_SECONDS:-270}
check_number NNODES 1 100000
check_choice RDZV_BACKEND c10d static
check_number MAX_RESTARTS 0 1000
check_number JOIN_SECONDS 1 100000
check_number SAVE_SECONDS 1 100000
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$(count_gpus)
    [[ $NPROC_PER_NODE != 0 ]] || NPROC_PER_NODE='' bad_value NPROC_PER_NODE \
        "is not set, and $(uname -n) shows no GPU" "set it, to 1 for one process on the CPU"
fi
check_number NPROC_PER_NODE 1 1000

if ((NNODES == 1)); then
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    LOCAL_ADDR=${LOCAL_ADDR:-127.0.0.1}
    [[ $RDZV_BACKEND == c10d ]] || MASTER_PORT=${MASTER_PORT:-29500}
    NODE_RANK=0
fi
[[ -z $NODE_RANK ]] || check_number NODE_RANK 0 $((NNODES - 1))
[[ $RDZV_BACKEND == c10d || -n $NODE_RANK ]] ||
    bad_value NODE_RANK "is not set" "number the nodes from 0, or leave RDZV_BACKEND at c10d"
[[ -n ${MASTER_ADDR:-} ]] ||
    bad_value MASTER_ADDR "is not set, of $NNODES nodes" "set it to the name of the first one, on all"
if [[ -n ${MASTER_PORT:-} ]] || ((NNODES > 1)); then
    MASTER_PORT=${MASTER_PORT:-29500}
    check_number MASTER_PORT 1 65535
    [[ $NODE_RANK != 0 ]] || check_port_is_free
fi
place=(--rdzv-backend "$RDZV_BACKEND" --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-0}")
place+=(--rdzv-id "${RUN_ID:-train}")
[[ -z ${LOCAL_ADDR:-} ]] || place+=(--local-addr "$LOCAL_ADDR")
if [[ $RDZV_BACKEND == static ]]; then
    place+=(--node-rank "$NODE_RANK" --rdzv-conf "timeout=$JOIN_SECONDS")
else
    is_host=
    # torchrun would guess it from the host's names, which an address of another network is not among.
    [[ -z $NODE_RANK ]] || is_host=,is_host=$((NODE_RANK == 0))
    # The first node may be the last to come: the others try to reach it as long.
    place+=(--rdzv-conf "join_timeout=$JOIN_SECONDS,read_timeout=$JOIN_SECONDS$is_host")
    # A node that joins again counts its restarts from 0: each attempt needs a store of its own.
    ((NNODES == 1)) || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

if [[ -n ${SOCKET_IFNAME:-} ]]; then
    check_interfaces
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$SOCKET_IFNAME}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$SOCKET_IFNAME}
fi

logs=()
if [[ -n ${LOG_DIR:-} ]]; then
    LOG_DIR=$LOG_DIR/$(uname -n)
    mkdir -p "$LOG_DIR" 2>/dev/null || bad_value LOG_DIR "cannot be made" "choose another folder"
    # Standard output of the first rank of the node, standard error of all.
    shown=0:3
    for ((local_rank = 1; local_rank < NPROC_PER_NODE; local_rank++)); do
        shown+=,$local_rank:2
    done
    logs=(--log-dir "$LOG_DIR" --redirects 3 --tee "$shown")
    # shellcheck disable=SC2016 # torchrun fills it in
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
fi

# One CUDA queue keeps tensor-parallel communication in the order in which it was issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Packed rows differ in length, which fragments a caching allocator of fixed segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# torchrun hands these signals to its processes, and leaves them time to save before it kills them.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export PET_SHUTDOWN_TIMEOUT=$SAVE_SECONDS

source "$repository/examples/pass_signals.sh"
# torchrun ends with 1 whatever its processes ended with: they leave that in a file.
MEGATRON_DLM_STATUS_FILE=$(mktemp)
export MEGATRON_DLM_STATUS_FILE
trap 'rm -f "$MEGATRON_DLM_STATUS_FILE"' EXIT

# On several nodes torchrun would wait for all of them to start the ranks again: where they have
# ended with a status that no restart changes, other nodes may never come.
# shellcheck disable=SC2329 # pass_signals calls it
run_torchrun() {
    local torchrun=$BASHPID
    # The file ends with this script: whoever has torchrun's number then is another process.
    while ((NNODES > 1)) && sleep 1 && [[ -e $MEGATRON_DLM_STATUS_FILE ]]; do
        if grep -qsv '^0$' "$MEGATRON_DLM_STATUS_FILE"; then
            sleep $((JOIN_SECONDS < 30 ? JOIN_SECONDS : 30)) # ranks may report until then
            [[ ! -e $MEGATRON_DLM_STATUS_FILE ]] || kill "$torchrun" 2>/dev/null || true
            break
        fi
    done >/dev/null 2>&1 &
    exec torchrun "$@"
}

status=0
PASS_AS=TERM pass_signals run_torchrun \
    --nnodes "$NNODES" \
    --nproc-per-node "$NPROC_PER_NODE" \
    --max-restarts "$MAX_RESTARTS" \
    "${place[@]}" "${logs[@]}" \
    "$repository/pretrain_opdlm.py" "${flags[@]}" "$@" || status=$?
if ((status)) && [[ -s $MEGATRON_DLM_STATUS_FILE ]]; then
    status=$(<"$MEGATRON_DLM_STATUS_FILE")
elif ((status == 1 && NNODES > 1)) && [[ $NODE_RANK != 0 ]] && ! master_answers; then
    echo "error: MASTER_ADDR = '$MASTER_ADDR': torchrun of that node has ended or cannot be reached" \
        "at port $MASTER_PORT; look at its output, and start all nodes again" >&2
fi
if ((status)) && [[ -n ${LOG_DIR:-} ]]; then
    echo "ended with status $status; logs of the ranks of $(uname -n): $LOG_DIR" >&2
fi
exit "$status"

# shellcheck shell=bash
# Sourced by launch.sh: a command in a container of this host.

# Variables that a launcher, the training and its libraries read, by the beginning of their names.
IN_CONTAINER='^(MODEL|TEACHER|PROMPTS|DATA_PATH|VALID_DATA_PATH|SAVE|NUM_ROLLOUTS|NPROC_PER_NODE|MAX_RESTARTS'
IN_CONTAINER+='|SAVE_SECONDS|JOIN_SECONDS|NNODES|NODE_RANK|MASTER_|LOCAL_ADDR|RDZV_|RUN_ID|SOCKET_IFNAME|LOG_DIR'
IN_CONTAINER+='|SETUP_SCRIPT|VENV|CUDA_(VISIBLE|DEVICE|LAUNCH|MODULE)_|NCCL_|GLOO_|UCX_|TORCH_(NCCL|DISTRIBUTED|DISABLE|LOGS)|PYTORCH_|OMP_|HF_|WANDB_|SLURM_JOB_ID|SLURM_NODEID'
IN_CONTAINER+='|SLURM_RESTART_COUNT|SLURM_GPUS_ON_NODE|MEGATRON_DLM_API_KEY)'

# Run a command in CONTAINER_IMAGE, with this host's GPUs and network, the current folder and this
# repository, and in place of this shell: in_container REPOSITORY COMMAND...
in_container() {
    local repository=$1 options name mount mounts
    shift
    options=(--rm --init --network host --ipc host)
    ! command -v nvidia-smi >/dev/null || options+=(--gpus all)
    # NCCL registers memory with the network's devices; torch's kernels need deep stacks.
    options+=(--ulimit memlock=-1 --ulimit stack=67108864)
    [[ ! -d /dev/infiniband ]] || options+=(--device /dev/infiniband)
    options+=(--user "$(id -u):$(id -g)" --volume "$PWD:$PWD" --workdir "$PWD")
    [[ $repository == "$PWD" ]] || options+=(--volume "$repository:$repository")
    IFS=, read -ra mounts <<<"${CONTAINER_MOUNTS:-}"
    for mount in "${mounts[@]}"; do
        options+=(--volume "$mount")
    done
    for name in $(compgen -e); do
        [[ ! $name =~ $IN_CONTAINER ]] || options+=(--env "$name")
    done
    exec "$CONTAINER_RUNTIME" run "${options[@]}" "$CONTAINER_IMAGE" "$@"
}

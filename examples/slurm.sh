# shellcheck shell=bash
# Sourced by train.slurm, in the repository's root.
#
# Slurm sends USR1 to the batch script some minutes before the time limit (--signal=B:USR1@…), and
# TERM where it preempts the job. The script passes it on to the training, which saves and ends with
# status 75; the job is then queued again, and goes on. It is not where training diverged (status 3)
# or was started wrongly (status 2).
source examples/pass_signals.sh

# Run launch.sh with its arguments on all nodes; one that fails ends the others.
train_and_requeue() {
    local status=0 container=() nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export NNODES=$SLURM_JOB_NUM_NODES
    # Of this job's nodes, whatever the shell of sbatch has: Slurm hands that on.
    unset NODE_RANK LOCAL_ADDR
    export MASTER_ADDR=${nodes%%$'\n'*}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export RUN_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    export LOG_DIR=${LOG_DIR:-logs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
    if [[ -n ${CONTAINER_IMAGE:-} && ${CONTAINER_RUNTIME:-pyxis} == pyxis ]]; then
        container=(--container-image "$CONTAINER_IMAGE" --container-workdir "$PWD")
        container+=(--container-mounts "$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
        unset CONTAINER_IMAGE # the nodes are in it
    fi
    pass_signals srun --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" \
        bash examples/launch.sh "$@" || status=$?
    if ((status == 75)); then
        echo "stopped and saved: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

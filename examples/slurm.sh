# Sourced by the Slurm scripts, in the repository's root.
#
# Slurm sends USR1 to the batch script some minutes before the time limit (--signal=B:USR1@…), and
# TERM where it preempts the job. The script passes it on to the training, which saves and ends with
# status 75; the job is then queued again, and goes on. It is not where training diverged (status 3)
# or was started wrongly (status 2).
source examples/pass_signals.sh

# Run a training script on all nodes; one that fails ends the others.
train_and_requeue() {
    export NNODES=$SLURM_JOB_NUM_NODES
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    export MASTER_ADDR
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    local status=0
    pass_signals srun --kill-on-bad-exit=1 bash "$@" || status=$?
    if ((status == 75)); then
        echo "stopped and saved: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

# shellcheck shell=bash
# Sourced by launch.sh and slurm.sh.

# Run a command in the background, pass the signals that ask a run to stop on to it, and end as it
# does: bash by itself would end at once, or wait for the command first.
pass_signals() {
    local child status signal
    "$@" &
    child=$!
    for signal in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064 # the process of now
        trap "kill -s ${PASS_AS:-$signal} $child 2>/dev/null || true" "$signal"
    done
    while true; do
        status=0
        wait "$child" || status=$?
        # A signal ends `wait` too.
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM INT USR1 USR2
    return "$status"
}

# shellcheck shell=bash
# Sourced by launch.sh and submit.sh: errors in variables, and what a node has.

# Say what is wrong with a variable, and end: bad_value NAME PROBLEM REMEDY
bad_value() {
    echo "error: $1 = '${!1-}': $2; $3" >&2
    exit 2
}

# End unless a variable is a whole number from LEAST to MOST: check_number NAME LEAST MOST
check_number() {
    if ! [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((${!1} < $2 || ${!1} > $3)); then
        bad_value "$1" "is no whole number from $2 to $3" "choose one"
    fi
}

# End unless somebody can have written this variable: check_choice NAME CHOICE...
check_choice() {
    local name=$1 choice
    shift
    for choice in "$@"; do
        [[ ${!name} != "$choice" ]] || return 0
    done
    bad_value "$name" "is unknown" "choose one of $*"
}

# Print how many GPUs this process may use: those that it sees, that Slurm gave, or that are there.
count_gpus() {
    local devices
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        case $CUDA_VISIBLE_DEVICES in
            "" | -1 | NoDevFiles) echo 0 ;;
            *)
                IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
                echo ${#devices[@]}
                ;;
        esac
    elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

# End if somebody listens at MASTER_PORT of this host already.
check_port_is_free() {
    if (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
        bad_value MASTER_PORT "another process of $(uname -n) listens there" \
            "end that one, or choose another port, the same on all nodes"
    fi
}

# Whether somebody listens at MASTER_ADDR and MASTER_PORT.
master_answers() {
    # shellcheck disable=SC2016 # the other bash expands them
    timeout 10 bash -c 'exec 3<>"/dev/tcp/$1/$2"' _ "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null
}

# End unless this host has the network interfaces in SOCKET_IFNAME.
check_interfaces() {
    local name present
    [[ -r /proc/net/dev ]] || return 0
    present=$(sed -n 's/^ *\([^:]*\):.*/\1/p' /proc/net/dev)
    for name in ${SOCKET_IFNAME//,/ }; do
        grep -qxF -- "$name" <<<"$present" ||
            bad_value SOCKET_IFNAME "$(uname -n) has no interface $name" \
                "choose of: ${present//$'\n'/, }"
    done
}

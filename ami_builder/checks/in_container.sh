# Run a Python program in the container's namespaces but outside its cgroup: importing distributed takes
# about 100 MB, which must not count against the limit that is checked.
# Arguments: the container's main pid, seconds, the Python program, its arguments. POSIX sh, run by root.
set -u
pid=$1 seconds=$2 program=$3
shift 3
set -- PYTHONDONTWRITEBYTECODE=1 nsenter -t "$pid" -m -n -i -u -p -- python -c "$program" "$@"
# shellcheck disable=SC2016  # expanded by the shell that xargs starts
exec timeout "$seconds" xargs -0 -a "/proc/$pid/environ" sh -c '
    # xargs puts the environment last, but env needs it first.
    words=$0
    while [ "$words" -gt 0 ]; do
        set -- "$@" "$1"
        shift
        words=$((words - 1))
    done
    exec env -i "$@"
' "$#" "$@"

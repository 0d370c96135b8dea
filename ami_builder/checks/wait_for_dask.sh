# Wait until the machine has booted and Dask answers, or has failed; then read the values that change with time.
# Arguments: the nonce, the seconds to wait, the least number of workers. POSIX sh, run by root.
set -u
export LC_ALL=C

section() { printf '\n\036%s\n' "$1"; }
uptime_seconds() {
    read -r up _ </proc/uptime
    echo "${up%.*}"
}
# Ask from outside the container: an exec would run inside the cgroup that is checked.
get() {
    # shellcheck disable=SC2016  # expanded by bash
    timeout 60 bash -c \
        'exec 3<>/dev/tcp/127.0.0.1/8787 && printf "GET $0 HTTP/1.0\r\n\r\n" >&3 && cat <&3' "$1" 2>/dev/null
}
# Count the workers that the scheduler lists in Dask's route /json/identity.json.
workers() { printf '%s' "$identity" | grep -o '"type": "Worker"' | wc -l; }
started() {
    case $(systemctl is-system-running 2>/dev/null) in
        running | degraded | maintenance | stopping) return 0 ;;
        *) return 1 ;;
    esac
}

end=$(($(uptime_seconds) + $2))
late() { [ "$(uptime_seconds)" -ge "$end" ]; }

# One call that blocks: repeated calls took more than half of a CPU from the boot of an emulated VM.
timeout "$2" systemctl is-system-running --wait >/dev/null 2>&1
section nonce
cat /var/lib/ami-builder/nonce 2>/dev/null
[ "$(cat /var/lib/ami-builder/nonce 2>/dev/null)" = "$1" ] || exit 0

least=$3
reason='' registered=0
while [ -z "$reason" ]; do
    identity=$(get /json/identity.json)
    case $identity in
        HTTP/*\ 200\ *)
            registered=$(workers)
            if [ "$registered" -ge "$least" ]; then
                reason="Dask answers"
                continue
            fi
            ;;
    esac
    ActiveState='' NRestarts=0 Job='' ExecMainPID=0
    eval "$(systemctl show dask.service -p ActiveState -p NRestarts -p Job -p ExecMainPID | sed 's/=\(.*\)/="\1"/')"
    if late; then
        reason="Dask did not have $least workers within $2 s, it has $registered; dask.service is $ActiveState"
    elif [ "$ActiveState" = failed ]; then
        reason="dask.service has failed"
    elif [ "${NRestarts:-0}" -ge 3 ]; then
        reason="dask.service was restarted $NRestarts times"
    elif [ "$ActiveState" = inactive ] && [ -z "$Job" ] && started; then
        reason="dask.service was never started"
        [ "${ExecMainPID:-0}" = 0 ] || reason="dask.service has ended without an error"
    else
        sleep 1
    fi
done
section settled
printf '%s\n' "$reason"
section identity
printf '%s\n' "$identity"

# There should be one container of the project; if there are several, the checks report it and use the newest.
id=$(docker ps -q --no-trunc --filter label=com.docker.compose.project=dask 2>/dev/null | head -n 1)
pid=
[ -z "$id" ] || pid=$(docker inspect -f '{{.State.Pid}}' "$id")
section container
printf '%s\n%s\n' "$id" "$pid"

# At one moment, before other programs of the checks run: the available memory, and what Dask would free.
section meminfo
cat /proc/meminfo
section memory.stat
[ -z "$pid" ] || cat "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/memory.stat"

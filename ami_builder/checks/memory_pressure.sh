# Put the Dask container under memory pressure and report what happened to it, and to the machine.
# Arguments: the container's id and main pid, seconds, the number of workers, the data to store as a
# multiple of their limit, the texts of in_container.sh and memory_pressure.py.
# POSIX sh, run by root, detached from any login: a machine that can't keep its limit may end every login.
set -u
export LC_ALL=C
id=$1 pid=$2 seconds=$3 workers=$4 work=$5 probe=$6 program=$7
# The kernel must never choose this script, which reports.
echo -1000 >/proc/self/oom_score_adj

section() { printf '\n\036%s\n' "$1"; }
clock() { date +%s.%N; }
uptime_seconds() {
    read -r up _ </proc/uptime
    echo "${up%.*}"
}
end=$(($(uptime_seconds) + seconds))
progress() { printf '%s\n' "$1" >/run/ami-builder-pressure.progress; }
# Wait for one of some files, or the end of the container or of the time; pass on the progress of the steps.
wait_for() {
    while [ -e "/proc/$pid/root" ] && [ "$(uptime_seconds)" -lt "$end" ]; do
        for file; do [ ! -e "$file" ] || return 0; done
        if [ -r "$outside.progress" ] && read -r doing <"$outside.progress"; then progress "$doing"; fi
        sleep 1
    done
}
services() {
    systemctl show '*.service' -p Id -p Type -p ActiveState -p SubState -p Result -p NRestarts -p InvocationID
}
container() {
    docker inspect -f '{{.Id}} {{.State.Running}} {{.State.StartedAt}} {{.RestartCount}}' "$id" 2>&1
}

memcg=$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
folder=/sys/fs/cgroup$memcg
inside=/dev/shm/ami-builder-pressure
outside=/proc/$pid/root$inside
rm -f "$outside".*
began=$(clock)
# It shows when the kernel's clock began, and what came later.
mark="ami-builder: the time is $began"
printf '<7>%s\n' "$mark" >/dev/kmsg

progress "asking the workers"
section memcg
printf '%s\n' "$memcg"
section memory.max
cat "$folder/memory.max"
section meminfo
cat /proc/meminfo
section services.before
services
section container.before
container

section client
# Dask's steps must time out before this script does.
sh -c "$probe" sh "$pid" "$seconds" "$program" "$workers" "$work" "$((end - seconds / 4))" "$inside" 2>&1
wait_for "$outside.leaked" "$outside.json"

# The whole limit, in addition to what is in use; without a limit, nearly all memory of the machine.
size=$(cat "$folder/memory.max")
[ "$size" != max ] || size=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) * 1000))
progress "another process takes the whole limit"
section grower
printf 'began %s\n' "$(clock)"
# shellcheck disable=SC2016  # expanded by the inner shell
sh -c 'echo 0 >/proc/self/oom_score_adj; echo $$ >"$0/cgroup.procs" &&
    exec dd if=/dev/zero of=/dev/null bs="$1" count=1 iflag=fullblock status=none' "$folder" "$size" 2>&1 &
grower=$!
timeout "$((seconds / 4))" tail --pid="$grower" -f /dev/null || kill -9 "$grower"
wait "$grower"
printf 'status %s\npid %s\nended %s\n' "$?" "$grower" "$(clock)"
touch "$outside.grown"
progress "waiting for the workers to be back"
wait_for "$outside.json"

section dask
cat "$outside.json"
rm -f "$outside".*
section memory.stat
cat "$folder/memory.stat"
section processes
# All are up and idle now. For each process: id in the container, its own memory, name.
while read -r process; do
    sed -n 's/^NSpid:.*\t/NSpid: /p; s/^RssAnon:[ \t]*/RssAnon: /p; s/^Name:[ \t]*/Name: /p' "/proc/$process/status"
done <"$folder/cgroup.procs"
section services.after
services
section container.after
container
section kernel
# Not the journal: its times are those at which journald received the lines, late when memory has run out.
dmesg | sed -n "/$mark/,\$p" | grep -F -e "$mark" -e oom-kill:
section journal
journalctl --sync
journalctl -q --no-pager -b -t dask -o cat --since "@${began%.*}" |
    grep -F -e 'the kernel killed ' -e 'a container reports: '
section recorded
cat /run/dask/kills
section container.log
docker logs --since "${began%.*}" "$id" 2>&1 | grep -F ': ended '
section end
echo end

# Print everything that the checks need, in one call. POSIX sh, run by root; nothing here changes the machine,
# but for a process that takes memory for a moment.
# Arguments: the login user, the phase, the main pid of the Dask container (empty without one).
set -u
export LC_ALL=C
unset AVAILABLE_MEMORY_FOR_DASK
user=$1 phase=$2 pid=$3

section() { printf '\n\036%s\n' "$1"; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The slow commands run in the background.
all=$(docker ps -aq --no-trunc 2>/dev/null)
# shellcheck disable=SC2086  # one word an id
if [ -n "$all" ]; then docker inspect $all; else echo '[]'; fi >"$scratch/containers" 2>&1 &
# Print file $1 as Compose reads it without a measured value.
config() {
    file=$1
    role=$(sed -n "s/^DASK_ROLE=[\"']*\([a-z]*\).*/\1/p" /etc/dask/dask.env 2>/dev/null)
    export COMPOSE_PROJECT_NAME=dask COMPOSE_PROFILES="${role:-local}" COMPOSE_ENV_FILES=/etc/dask/dask.env
    # The plugin is a program of its own; starting it directly takes half the time.
    set -- docker compose
    for plugin in /usr/local/lib /usr/local/libexec /usr/lib /usr/libexec; do
        [ ! -x "$plugin/docker/cli-plugins/docker-compose" ] || set -- "$plugin/docker/cli-plugins/docker-compose"
    done
    "$@" --project-directory /etc/dask -f "$file" config --format json
}
# Print the limit of a container without options, on the host's network as Dask's is; then try to reach the
# instance's metadata, which must fail.
plain() {
    image=$(docker inspect -f '{{.Image}}' "$(docker ps -q --filter label=com.docker.compose.project=dask | head -n 1)") || return
    timeout 120 docker run --rm --network host --entrypoint sh "$image" -c \
        'cat /sys/fs/cgroup/memory.max; python3 -c "$0"' \
        'import socket
try:
    socket.create_connection(("169.254.169.254", 80), 5)
    print("reached")
except OSError:
    print("refused")' 2>&1
}
if [ "$phase" = boot ]; then
    (plain >"$scratch/plain" 2>&1) &
    (config /etc/dask/compose.yaml >"$scratch/compose.unset" 2>&1) &
    (config /var/lib/ami-builder/compose.image.yaml >"$scratch/image.unset" 2>&1) &
fi

section booted
# One reading: a busy machine may take seconds between a date and an uptime.
sed -n 's/^btime //p' /proc/stat
section pagesize
getconf PAGESIZE
section memory.env
cat /run/dask/memory.env 2>/dev/null
section memory.env.time
stat -c %.9Y /run/dask/memory.env 2>/dev/null
section service
service=$(systemctl show dask.service -p ActiveState -p SubState -p UnitFileState -p NRestarts -p MainPID \
    -p InvocationID -p After -p Result -p ExecMainStartTimestampMonotonic)
printf '%s\n' "$service"
property() { printf '%s\n' "$service" | sed -n "s/^$1=//p"; }
main=$(property MainPID)
section service.environment
# The environment of start-dask's children: /proc shows a shell's own as it was at its start.
for child in $(cat "/proc/${main:-0}/task/${main:-0}/children" 2>/dev/null); do
    tr '\0' '\n' <"/proc/$child/environ" | grep '^AVAILABLE_MEMORY_FOR_DASK='
done
section scope
cat /run/systemd/system/docker-.scope.d/10-dask.conf 2>/dev/null
section cloud-final
systemctl show cloud-final.service -p ActiveState -p ExecMainExitTimestampMonotonic
section journal
# journald may be behind what services have written.
journalctl --sync
invocation=$(property InvocationID)
[ -z "$invocation" ] ||
    journalctl -q --no-pager -o cat "_SYSTEMD_INVOCATION_ID=$invocation" | grep -F AVAILABLE_MEMORY_FOR_DASK
section "last words"
[ -z "$invocation" ] || journalctl -q --no-pager -o cat -n 1 "_SYSTEMD_INVOCATION_ID=$invocation"
section "shell sudo -i"
sudo -u "$user" -i printenv AVAILABLE_MEMORY_FOR_DASK
section "shell bash -l"
runuser -u "$user" -- bash -lc 'printenv AVAILABLE_MEMORY_FOR_DASK'
section "shell sh -l"
runuser -u "$user" -- sh -lc 'printenv AVAILABLE_MEMORY_FOR_DASK'
section stored
grep -rIsE "AVAILABLE_MEMORY_FOR_DASK=[\"']?[0-9]" /etc /root /home /opt /srv
section failed
systemctl list-units --failed --plain --no-legend --no-pager
section spill-notices
cat /run/dask/spill-notices 2>/dev/null
section health
timeout 60 bash -c \
    'exec 3<>/dev/tcp/127.0.0.1/8787 && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && head -c 500 <&3' 2>&1

section cgroups
if [ -n "$pid" ] && [ -e "/proc/$pid/cgroup" ]; then
    path=$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
    while [ -n "$path" ] && [ "$path" != / ]; do
        printf '%s\n' "$path"
        (cd "/sys/fs/cgroup$path" && grep -s '' memory.max memory.high memory.low memory.min memory.swap.max)
        path=${path%/*}
    done
fi
section inside
# Through the container's own root: its mount of cgroupfs shows what a process in there reads.
[ -z "$pid" ] || cat "/proc/$pid/root/sys/fs/cgroup/memory.max" 2>/dev/null
section namespaces
[ -z "$pid" ] || readlink /proc/1/ns/cgroup "/proc/$pid/ns/cgroup"
section limits
if [ -n "$pid" ] && [ -e "/proc/$pid/cgroup" ]; then
    sed 's|.*|/proc/&/limits|' "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.procs" |
        xargs grep -hsE '^Max (resident set|address space)'
fi
section programs
cat /run/dask/programs 2>/dev/null
section min_free_kbytes
cat /proc/sys/vm/min_free_kbytes
# with what somebody has set on purpose
grep -hsE '^[-[:space:]]*vm[./]min_free_kbytes[[:space:]]*=' /etc/sysctl.conf /etc/sysctl.d/*.conf /run/sysctl.d/*.conf \
    /usr/local/lib/sysctl.d/*.conf /usr/lib/sysctl.d/*.conf
section lru_gen
cat /sys/kernel/mm/lru_gen/enabled /sys/kernel/mm/lru_gen/min_ttl_ms 2>/dev/null
section oom_score_adj
# of the container's processes, then of all
if [ -n "$pid" ] && [ -e "/proc/$pid/cgroup" ]; then
    sed 's|.*|/proc/&/oom_score_adj|' "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.procs" |
        xargs grep -s '' /dev/null
fi
echo all
grep -s '' /proc/[0-9]*/oom_score_adj
section mounts
[ -z "$pid" ] || cat "/proc/$pid/mountinfo" 2>/dev/null

section tls
# What Dask's port does with a client that has a certificate, one that has none, and one without TLS. Without TLS a
# scheduler sends the first byte; with TLS it answers with an alert (21) or ends the connection.
[ ! -s /run/dask/comm.env ] || timeout 120 python3 -I -c 'import socket, ssl
folder = "/run/dask/private/tls/"
def client(*pair):
    made = ssl.create_default_context(cafile=folder + "ca.pem")
    made.check_hostname = False
    if pair:
        made.load_cert_chain(*pair)
    return made.wrap_socket
def ask(wrap):
    try:
        with socket.create_connection(("127.0.0.1", 8786), 60) as plain, wrap(plain) as one:
            if one is plain:
                one.sendall(bytes(64))
            return "answers" if one.recv(1) not in (b"", b"\x15") else "refuses"
    except (ssl.SSLError, ConnectionResetError):
        return "refuses"
    except OSError as failed:
        return f"gives no answer: {failed}"
print("with a certificate:", ask(client(folder + "cert.pem", folder + "key.pem")))
print("without a certificate:", ask(client()))
print("without TLS:", ask(lambda plain: plain))' 2>&1
section tls.variables
cat /run/dask/comm.env 2>/dev/null

if [ "$phase" = boot ]; then
    # Five seconds of grace for a clock that is set while booting.
    boot="@$(($(sed -n 's/^btime //p' /proc/stat) - 5))"
    older() { find "$@" ! -newerct "$boot" -printf '%p\n' 2>/dev/null; }
    homes=$(getent passwd | cut -d: -f6 | sort -u)

    section compose
    cat /etc/dask/compose.yaml 2>/dev/null
    section compose.image
    cat /var/lib/ami-builder/compose.image.yaml 2>/dev/null
    section disk
    df -B1 --output=size / | tail -n 1
    device=$(findmnt -no SOURCE /)
    lsblk -bdnro SIZE "/dev/$(lsblk -dnro PKNAME "$device" | head -n 1)"
    section authorized
    for home in $homes; do
        [ ! -d "$home/.ssh" ] || grep -HsE '^[^#]' "$home"/.ssh/authorized_keys "$home"/.ssh/authorized_keys2
    done
    section listening
    ss -Hltnp
    section listening.dask
    # A worker under a nanny has the name of Python, so Dask's processes are known by their container.
    if [ -n "$pid" ] && [ -e "/proc/$pid/cgroup" ]; then
        cat "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.procs"
    fi
    section sshd
    sshd -T 2>/dev/null
    section metadata
    cat /etc/systemd/system/docker-.scope.d/20-metadata.conf 2>/dev/null
    section metadata.host
    timeout 10 bash -c 'exec 3<>/dev/tcp/169.254.169.254/80' 2>/dev/null && echo reached
    section hostkeys
    find /etc/ssh -name 'ssh_host_*_key' -printf '%p\n'
    section hostkeys.old
    older /etc/ssh -name 'ssh_host_*'
    section machine-id
    cat /etc/machine-id
    section machine-id.old
    older /etc/machine-id
    section boots
    journalctl -q --no-pager -F _BOOT_ID
    section journals
    [ ! -d /var/log/journal ] || find /var/log/journal -mindepth 1 -maxdepth 1 -printf '%f\n'
    section temporary
    older /tmp /var/tmp -mindepth 1 -maxdepth 1
    find /tmp /var/tmp /root /home -maxdepth 2 \( -iname '*packer*' -o -iname '*ami-builder*' \) -printf '%p\n'
    section logs
    older /var/log -type f -size +0
    section apt
    older /var/lib/apt/lists -type f ! -name lock
    older /var/cache/apt/archives -type f -name '*.deb'
    section histories
    for home in $homes; do
        for name in .bash_history .ash_history .python_history .lesshst .viminfo .wget-hsts .sudo_as_admin_successful; do
            [ ! -e "$home/$name" ] || older "$home/$name" -size +0
        done
    done
    section secrets
    for home in $homes; do
        for name in .aws .docker/config.json .netrc .pypirc .git-credentials .config/gcloud .azure .kube; do
            [ ! -e "$home/$name" ] || printf '%s\n' "$home/$name"
        done
    done
    {
        find /etc/dask -type f \( -name '*.pem' -o -name '*.key' \) -printf '%p\n' 2>/dev/null
        grep -rlIsE -e '-----BEGIN [A-Z ]*PRIVATE KEY-----' /root /home /etc/dask /opt /srv /var/lib/dask
    } | while read -r path; do
        case $path in
            /etc/dask/tls/*) older "$path" ;; # user data brings certificates
            *) printf '%s\n' "$path" ;;
        esac
    done
    section instances
    find /var/lib/cloud/instances -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null
    section cloud-id
    cat /run/cloud-init/cloud-id 2>/dev/null
    section cloud-result
    cat /run/cloud-init/result.json 2>/dev/null
    section cloud-status
    cat /run/cloud-init/status.json 2>/dev/null
fi

wait
for name in containers plain compose.unset image.unset; do
    [ ! -e "$scratch/$name" ] || {
        section "$name"
        cat "$scratch/$name"
    }
done
if [ "$phase" = boot ]; then
    # A process that takes more than the reserve, and ends. The image's own unit compares.
    compare() { timeout 60 systemctl restart dask-health.service; }
    compared() {
        section "growth.$1"
        cat /run/dask/health 2>/dev/null
    }
    # grow UNIT: take 32 MiB more than what is no news: 32 MiB, or 1 % of a large machine
    grow() {
        excess=$(sed -n 's/.*"excess": \(-\{0,1\}[0-9]*\),.*/\1/p' /run/dask/public/memory.json 2>/dev/null)
        [ "${excess:-0}" -lt 0 ] || excess=0
        size=$(awk '/^MemTotal:/ { printf "%.0f", $2 * 1024 / 100 }' /proc/meminfo)
        [ "$size" -ge 33554432 ] || size=33554432
        size=$((33554432 + size - excess))
        # tail keeps all of it until its input ends.
        systemd-run --quiet --collect --unit "$1" sh -c "{ head -c $size /dev/zero; sleep 600; } | tail -c $size >/dev/null"
        tries=0 taken=0
        while [ "$taken" -lt "$size" ] && [ "$tries" -lt 120 ]; do
            sleep 0.5
            read -r taken <"/sys/fs/cgroup/system.slice/$1/memory.current" || taken=0
            tries=$((tries + 1))
        done 2>/dev/null
    }
    compare
    compared before
    # Others may give back as much in between.
    for unit in ami-builder-grows ami-builder-grows-more ami-builder-grows-most; do
        grow "$unit.service"
        compare
        ! grep -qs ami-builder-grows.service /run/dask/health || break
    done
    compared grown
    section growth.measured
    cat /run/dask/public/memory.json 2>/dev/null
    systemctl stop 'ami-builder-grows*.service'
    compare
    compared ended
fi
section growth
# The timer's first comparison may be half a minute away.
[ -e /run/dask/public/memory.json ] || timeout 60 systemctl start dask-health.service
cat /run/dask/public/memory.json 2>/dev/null
section end

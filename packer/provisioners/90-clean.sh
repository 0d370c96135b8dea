#!/bin/sh
# Take out what belongs to the machine that baked: keys, identity, state, logs, caches. Then prove it.
# Run by Packer as root, last. CLEAN_ROOT is for tests: every path below is relative to it.
#
# Packer's connection survives: sshd reads keys only when somebody logs in.
# The AppArmor cache stays on purpose: without it the first boot compiles every profile.
set -eu

cd "${CLEAN_ROOT:-/}"

quietly() { "$@" >/dev/null 2>&1 || true; }

# Home directories, relative to here.
homes() {
    while IFS=: read -r _ _ _ _ _ home _; do
        case $home in
            /?*) [ ! -d ".$home" ] || echo ".$home" ;;
        esac
    done <etc/passwd | sort -u
}

# Both cleaning and its proof use these lists; what a pattern does not match is not there.
identity() {
    printf '%s\n' etc/ssh/ssh_host_* var/lib/dbus/machine-id \
        var/lib/systemd/random-seed boot/efi/loader/random-seed var/lib/systemd/credential.secret \
        var/lib/docker/engine-id etc/docker/key.json var/lib/containerd/io.containerd.grpc.v1.introspection/uuid
    homes | while read -r home; do
        printf '%s\n' "$home"/.ssh/authorized_keys* "$home"/.ssh/known_hosts*
    done
}
state() {
    printf '%s\n' var/lib/cloud/* etc/netplan/50-cloud-init.yaml etc/network/interfaces.d/50-cloud-init* \
        etc/systemd/network/10-cloud-init-* etc/NetworkManager/system-connections/cloud-init-* \
        etc/ssh/sshd_config.d/50-cloud-init.conf \
        var/lib/dhcp/* var/lib/dhcpcd/* var/lib/NetworkManager/*.lease var/lib/systemd/network/* \
        var/lib/systemd/timers/stamp-* var/lib/systemd/coredump/* var/lib/wtmpdb/* var/lib/lastlog/* \
        var/lib/dask/spill var/lib/ami-builder
}
caches() {
    printf '%s\n' var/lib/apt/lists/* var/cache/apt/*.bin var/cache/apt/archives/*.deb \
        var/cache/apt/archives/partial/* var/cache/debconf/*-old var/lib/dpkg/*-old
    homes | while read -r home; do
        printf '%s\n' "$home"/.*_history "$home"/.lesshst "$home"/.viminfo "$home"/.wget-hsts "$home"/.cache
    done
}
# systemd-private-* belongs to running services, and the next boot removes it; Packer removes its own script.
temporary() { find tmp var/tmp -mindepth 1 -maxdepth 1 ! -name 'systemd-private-*' ! -name "${0##*/}" ! -name '.*-unix'; }

remove() {
    while read -r path; do
        rm -rf "$path"
    done
}

# Stopping it writes a seed, as a shutdown would after the cleaning.
quietly systemctl stop systemd-random-seed.service
# Makes journald close its files on disk, so that their space is free.
quietly journalctl --relinquish-var

identity | remove
state | remove
caches | remove
temporary | remove
rm -rf var/log/journal/*
find var/log -type f -delete
# Empty, not "uninitialized": the next boot makes a new one without the rest of systemd's first boot,
# which would set every unit to the distribution's preset.
: >etc/machine-id

left=$(
    { identity && state && caches && temporary; } | while read -r path; do
        if [ -e "$path" ] || [ -L "$path" ]; then echo "$path"; fi
    done
    find var/log -type f
    find etc/machine-id -size +0
    find var/lib/docker/containers -mindepth 1 -maxdepth 1 2>/dev/null || true
)
if [ -n "$left" ]; then
    echo "90-clean: these must not be in the image:" >&2
    echo "$left" >&2
    exit 1
fi

if [ -d var/lib/dbus ]; then ln -s /etc/machine-id var/lib/dbus/machine-id; fi
quietly fstrim --all --quiet-unsupported
sync
echo "90-clean: nothing of this machine is left"

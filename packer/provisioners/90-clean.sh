#!/bin/sh
# Delete everything that belongs to the building machine: keys, identity, state, logs, caches. Then check that it is
# deleted, and overwrite the free space: an image is a copy of the disk, including free blocks.
# Run by Packer as root, last. CLEAN_ROOT is for tests: every path below is relative to it.
#
# Packer's connection stays open: sshd reads keys only at a login.
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

# Cleaning and its check use the same lists.
identity() {
    printf '%s\n' etc/ssh/ssh_host_* var/lib/dbus/machine-id \
        var/lib/systemd/random-seed boot/efi/loader/random-seed var/lib/systemd/credential.secret \
        etc/dask/tls/* run/dask/private/tls/* \
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
        etc/dask/tls run/dask/private var/lib/dask/spill var/lib/ami-builder
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

# Do not follow a link, whose target has other uses.
shred_files() {
    while read -r path; do
        if [ -f "$path" ] && [ ! -L "$path" ]; then quietly shred -n 0 -z "$path"; fi
    done
}

# Set `size` to that of ext4's journal, in bytes. While the kernel writes the superblock, debugfs takes it for damaged.
read_log_size() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        size=$(debugfs -R 'stat <8>' "$1" 2>/dev/null | sed -n 's/^User: .* Size: \([0-9]*\)$/\1/p')
        [ "${size:-0}" -eq 0 ] || return 0
        sync
        sleep 0.3
    done
    return 1
}

# Names of deleted files stay in ext4's journal until it has been overwritten. Data goes to the journal too if a file
# has that attribute, but not with delayed allocation.
overwrite_log() {
    read_log_size "$2" && mount -o remount,nodelalloc "$1" && : >"$zeros" && chattr +j "$zeros" &&
        dd if=/dev/zero of="$zeros" bs=1M count=$((size / 1048576 + 2)) conv=fsync 2>/dev/null &&
        mount -o remount,delalloc "$1"
}

# Large direct writes, then small ones for the rest; the disk is full only for a moment at the end. Blocks that are
# reserved for recently written data, or were freed a moment ago, cannot be used and may be free later: so all data is
# written to disk first, and the rest is filled at least twice. ext4 counts such blocks as free.
overwrite_free() {
    # Blocks that ext4 reserves until it is mounted again.
    for reserve in sys/fs/ext4/*/reserved_clusters; do
        [ ! -e "$reserve" ] || echo 0 >"$reserve"
    done
    sync
    quietly dd if=/dev/zero of="$zeros" bs=16M oflag=direct
    left=0
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        last=$(LC_ALL=C dd if=/dev/zero of="$zeros" bs=4k oflag=append conv=notrunc 2>&1) || true
        sync
        [ "$attempt" -gt 1 ] || continue
        case "$2: $last" in
            ext[34]:*'No space left'*) left=$(stat -f -c %f "$1") ;;
        esac
        [ "$left" -gt 0 ] || break
        sleep 0.5
    done
    rm -f "$zeros"
    case $last in
        *'No space left'*) ;;
        *) echo "90-clean: the free space of $1 could not be overwritten: $last" >&2 && return 1 ;;
    esac
    [ "$left" -eq 0 ] || echo "90-clean: $left free blocks of $1 were not overwritten, and may contain deleted files" >&2
}

# Print the file systems that are mounted here and below; none for a folder that is no mount point, as in tests.
overwrite() {
    findmnt --submounts --raw --noheadings --output TARGET,SOURCE,FSTYPE "$PWD" | while read -r target source type; do
        case $type in
            ext[234] | xfs | btrfs) [ -w "$target" ] || continue ;;
            *) continue ;;
        esac
        zeros=${target%/}/.90-clean.zeros
        trap 'rm -f "$zeros"' EXIT
        trap 'exit 1' HUP INT TERM
        case $type in
            ext[34]) overwrite_log "$target" "$source" ||
                echo "90-clean: the journal of $source could not be overwritten, and may contain names of deleted files" >&2 ;;
        esac
        rm -f "$zeros"
        overwrite_free "$target" "$type"
    done
}

# Its stop writes a seed, which a shutdown would otherwise write after the cleaning.
quietly systemctl stop systemd-random-seed.service
# journald closes its files on disk, so that their space becomes free.
quietly journalctl --relinquish-var

# Overwrite in place, for file systems whose free space cannot all be overwritten later.
{ identity && echo etc/machine-id; } | shred_files
identity | remove
state | remove
caches | remove
temporary | remove
rm -rf var/log/journal/*
# A program may still have its log open.
find var/log -type f -exec truncate -s 0 {} +
find var/log -type f -delete
# Empty, not "uninitialized": then the next boot makes a new id, but does not apply the distribution's presets to all
# units.
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
    echo "90-clean: the image must not contain these files:" >&2
    echo "$left" >&2
    exit 1
fi

if [ -d var/lib/dbus ]; then ln -s /etc/machine-id var/lib/dbus/machine-id; fi
# A trim is not enough: it skips blocks that share a cluster of the disk with used ones, and EBS has no trim.
overwrite
quietly fstrim --all --quiet-unsupported
sync
echo "90-clean: no files of this machine are left"

#!/bin/sh
# Runs inside the new system as the last step of its installation.
set -eu

# Names are resolved by systemd-resolved.
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
systemctl -q enable systemd-networkd.service

# Units that a cloud instance does not need, and that delay the boot. `systemctl unmask` enables one again.
systemctl -q mask \
    modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service modprobe@efi_pstore.service \
    modprobe@fuse.service modprobe@loop.service systemd-pstore.service systemd-udev-load-credentials.service \
    systemd-hibernate-clear.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount \
    systemd-network-generator.service e2scrub_reap.service
systemctl -q disable e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
mkdir -p /etc/systemd/system-generators
for name in ssh gpt-auto hibernate-resume tpm2; do
    ln -s /dev/null "/etc/systemd/system-generators/systemd-$name-generator"
done

# AppArmor's own profiles are for about a hundred desktop programs, and compiling them was the longest part of a boot.
# Docker loads its own profile, and so do packages that are installed later.
for profile in /etc/apparmor.d/*; do
    [ ! -f "$profile" ] || ln -s "$profile" /etc/apparmor.d/disable/
done

# Docker uses only the shim of version 2, and not containerd's client: this saves more than 20 MB.
rm -f /usr/bin/containerd-shim /usr/bin/containerd-shim-runc-v1 /usr/bin/ctr

# Each machine makes its own.
rm -f /etc/ssh/ssh_host_* /var/lib/systemd/random-seed /var/lib/dbus/machine-id
: >/etc/machine-id
rm -rf /var/log/*.log /var/log/apt/*

# The databases that systemd renews when /usr is newer than these are up to date.
touch /etc/.updated /var/.updated

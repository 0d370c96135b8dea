#!/bin/sh
# Load or pull the Dask container's image, check that Docker has it, enable Dask, and record the installed packages.
# Run by Packer as root, with
#   CONTAINER_REFERENCE  name:tag that Compose uses
#   CONTAINER_ARCHIVE    file or disk with a `docker save` archive; empty: pull the reference
#   INSECURE_REGISTRY    host:port of a registry without TLS, during the build only; empty: none
# DOCKER_CONFIG_FILE and RECORD are for tests.
set -eu

config=${DOCKER_CONFIG_FILE:-/etc/docker/daemon.json}
record=${RECORD:-/var/tmp/packages.txt}

die() {
    echo "20-container: $1" >&2
    exit 1
}

restore() {
    rm -f "$config"
    [ ! -e "$config.kept" ] || mv "$config.kept" "$config"
}

allow_insecure() {
    mkdir -p "${config%/*}"
    # The image must keep the base's configuration, and nothing of this one.
    [ ! -e "$config" ] || mv "$config" "$config.kept"
    trap restore EXIT
    trap 'exit 1' HUP INT TERM
    echo "{\"insecure-registries\": [\"$INSECURE_REGISTRY\"]}" >"$config"
    systemctl reload docker.service
}

# Docker takes a while to read a changed configuration, and registries fail temporarily.
pull() {
    for seconds in 2 5 15 0; do
        if docker pull --quiet "$CONTAINER_REFERENCE"; then return 0; fi
        sleep "$seconds"
    done
    die "$CONTAINER_REFERENCE could not be pulled"
}

systemctl start docker.service ||
    die "Docker does not start: $(journalctl --unit docker --boot --output cat --no-pager --lines 3)"
if [ -n "${CONTAINER_ARCHIVE:-}" ]; then
    [ -r "$CONTAINER_ARCHIVE" ] || die "$CONTAINER_ARCHIVE can't be read"
    docker load --quiet --input "$CONTAINER_ARCHIVE" || die "$CONTAINER_ARCHIVE could not be loaded"
else
    if [ -n "${INSECURE_REGISTRY:-}" ]; then allow_insecure; fi
    pull
fi

id=$(docker image inspect --format '{{.Id}}' "$CONTAINER_REFERENCE") ||
    die "Docker has no image $CONTAINER_REFERENCE after loading: check the name in the archive"

# Not earlier: Docker's start would start Dask too, which must not run during the build.
systemctl enable --quiet dask.service dask-memory.service dask-health.timer dask-notices.service \
    dask-reports.socket watch-kills.service
for unit in mount-spill.service security-updates.service dask-follow.service; do
    [ ! -e "/etc/systemd/system/$unit" ] || systemctl enable --quiet "$unit"
done

mkdir -p "${record%/*}"
{
    if command -v dpkg-query >/dev/null; then
        dpkg-query --show --showformat '${Package}=${Version}\n'
    elif command -v rpm >/dev/null; then
        rpm --query --all --queryformat '%{NAME}=%{VERSION}-%{RELEASE}\n'
    fi | LC_ALL=C sort
    echo "container:$CONTAINER_REFERENCE=$id"
} >"$record"
# The identity of this machine; the raw disk is searched for it.
grep -hs . /etc/machine-id /etc/ssh/ssh_host_*.pub /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys \
    >"${record%/*}/identity.txt" || true
echo "20-container: $CONTAINER_REFERENCE is $id"

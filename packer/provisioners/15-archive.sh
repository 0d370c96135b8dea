#!/bin/sh
# Build the archive of the Dask container's image on this machine, and remove again what only that needed.
# Run by Packer as root, with
#   CONTAINER_RECIPE   tar archive of the scripts and requirements that build it
#   CONTAINER_ARCHIVE  file to write
# WORK is for tests.
set -eu

work=${WORK:-/var/tmp/container-recipe}
export DEBIAN_FRONTEND=noninteractive

die() {
    echo "15-archive: $1" >&2
    exit 1
}

apt() { apt-get -o DPkg::Lock::Timeout=300 -o DPkg::Use-Pty=0 -o Acquire::Retries=3 -qq -y "$@" >&2; }

installed() {
    dpkg-query --show --showformat '${db:Status-Status} ${binary:Package}\n' | sed -n 's/^installed //p' |
        LC_ALL=C sort
}

elsewhere='set container.source to "registry", or to "archive" on a host that has mmdebstrap'
command -v apt-get >/dev/null ||
    die "the base has no apt-get, which is needed to build the container here: $elsewhere"
apt update || die "the base's package lists could not be read: can this machine reach them? If not, $elsewhere"
[ -n "$(apt-cache search --names-only '^mmdebstrap$')" ] ||
    die "the base has no package mmdebstrap, which builds the container: $elsewhere"

rm -rf "$work"
mkdir -p "$work"
installed >"$work/before"
echo '15-archive: installing mmdebstrap and pip'
apt install --no-install-recommends mmdebstrap python3-pip debian-archive-keyring
tar --extract --file "$CONTAINER_RECIPE" --directory "$work" --no-same-owner --preserve-permissions
echo '15-archive: building the container'
AMI_BUILDER_CACHE="$work/cache" PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    "$work/build" "$CONTAINER_ARCHIVE" ||
    die "the container could not be built: can this machine reach Debian's packages and PyPI? If not, $elsewhere"

# The image's list of packages has nothing of this.
echo '15-archive: removing mmdebstrap and pip'
installed | LC_ALL=C comm -13 "$work/before" - >"$work/added"
# shellcheck disable=SC2046 # one word for each package
[ ! -s "$work/added" ] || apt purge $(cat "$work/added")
installed | cmp -s "$work/before" - || die "what was installed to build the container could not be removed again"
rm -rf "$work"

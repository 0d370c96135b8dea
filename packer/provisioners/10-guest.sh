#!/bin/sh
# Install Docker, Compose and curl if they are missing, then the guest's files.
# Run by Packer as root, with
#   PACKAGES  further packages that the image must have, such as agents
# GUEST_ROOT and GUEST_ARCHIVE are for tests.
set -eu

archive=${GUEST_ARCHIVE:-/var/tmp/guest.tar}
export DEBIAN_FRONTEND=noninteractive

die() {
    echo "10-guest: $1" >&2
    exit 1
}

# Look for the plugin's file first: starting it takes seconds on an emulated VM.
has_compose() {
    for directory in /usr/local/lib /usr/local/libexec /usr/lib /usr/libexec; do
        [ ! -x "${GUEST_ROOT:-}$directory/docker/cli-plugins/docker-compose" ] || return 0
    done
    docker compose version >/dev/null 2>&1
}

apt() { apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -qq -y "$@" >&2; }

# Succeeds if APT can install package $1 in a version that begins with a digit of $2.
offered() { apt-cache policy "$1" | grep -q "^  Candidate: [$2]"; }

install_docker() {
    command -v apt-get >/dev/null ||
        die "the base has no docker compose, and no apt-get to install it: use a base that has Docker and Compose 2"
    echo "10-guest: installing Docker and Compose"
    apt update
    packages=docker.io
    if offered docker-cli 0-9; then packages="$packages docker-cli"; fi
    if offered docker-compose-v2 0-9; then # Ubuntu
        packages="$packages docker-compose-v2"
    elif offered docker-compose 2-9; then # Debian 13
        packages="$packages docker-compose"
    else
        die "the base has no package of Compose 2: use Debian 13, Ubuntu 24.04, or a base with Docker's own packages"
    fi
    # shellcheck disable=SC2086 # one word for each package
    apt install --no-install-recommends $packages
    has_compose || die "docker compose does not run after the installation of $packages"
}

# The guest's programs ask EC2 and AWS by curl. Only calls to AWS need a version that can sign them.
install_curl() {
    if ! command -v curl >/dev/null; then
        command -v apt-get >/dev/null || die "the base has no curl, and no apt-get to install it: use a base that has curl"
        echo "10-guest: installing curl"
        apt update
        apt install --no-install-recommends curl ca-certificates
    fi
    case $(curl --version) in
        'curl 7.8'[789].* | 'curl '[89].* | 'curl '[1-9][0-9]*) ;;
        *) echo "10-guest: the base's curl is older than 7.87, so instances can't tell an Auto Scaling group of their health, nor read TLS certificates from Secrets Manager or SSM" ;;
    esac
}

# Print the $PACKAGES that are not installed; our own base disk has them all.
missing() {
    for package in ${PACKAGES:-}; do
        status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) || status=
        [ "$status" = installed ] || echo "$package"
    done
}

install_packages() {
    command -v apt-get >/dev/null ||
        die "the base has no apt-get to install base.packages: $*"
    echo "10-guest: installing $*"
    apt update
    apt install --no-install-recommends "$@"
}

# A cloud image may still be busy with its own first boot.
if [ -e /run/cloud-init/enabled ]; then cloud-init status --wait >/dev/null || true; fi

if ! has_compose; then install_docker; fi
install_curl
lacking=$(missing)
# shellcheck disable=SC2086 # one word for each package
if [ -n "$lacking" ]; then install_packages $lacking; fi

# A base with its own settings for Docker keeps them.
set --
if [ -e "${GUEST_ROOT:-}/etc/docker/daemon.json" ]; then
    echo "10-guest: the base has its own /etc/docker/daemon.json, so container.network has no effect"
    set -- --exclude etc/docker/daemon.json
fi
# Amazon Linux gives dockerd this flag, and Docker does not start if daemon.json has the same setting.
flags=${GUEST_ROOT:-}/etc/sysconfig/docker
if [ $# = 0 ] && grep -qs -e --default-ulimit "$flags"; then
    sed -i 's/--default-ulimit[= ][^ "]*//g' "$flags"
fi
tar --extract --file "$archive" "$@" --directory "${GUEST_ROOT:-/}" \
    --no-same-owner --preserve-permissions --no-overwrite-dir --keep-directory-symlink
systemctl daemon-reload
# Only if necessary: for a unit that also has a SysV script, `enable` starts perl. Packages enable Docker themselves.
systemctl is-enabled --quiet docker.service || systemctl enable --quiet docker.service
# 20-container.sh needs Docker, which takes long to start. One that runs must take its new settings.
systemctl restart --no-block docker.service

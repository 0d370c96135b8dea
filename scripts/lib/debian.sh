# shellcheck shell=bash
# What base-disk and container-archive share: messages, clean-up, Debian's sources, the download cache.

arch=
host_arch=
machine= # the kernel's name for `arch`
cache="${AMI_BUILDER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ami-builder}"
# Of itself only Debian's APT trusts Debian's keys; mmdebstrap would need gpg to find that out.
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
keyring_option=(--keyring="$keyring")
work=
child=
PATH="$PATH:/usr/sbin:/sbin"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# fail MESSAGE [STATUS]
fail() {
    say "error: $1"
    exit "${2:-1}"
}

# need COMMAND PACKAGE: stop unless COMMAND is installed.
need() {
    command -v "$1" >/dev/null || fail "$1 is missing (in Debian and Ubuntu: apt-get install $2)" 3
}

# need_keys MIRROR: stop without Debian's keys, unless a mirror may have its own.
need_keys() {
    [ -e "$keyring" ] && return
    [ -n "$1" ] || fail "$keyring is missing (in Debian and Ubuntu: apt-get install debian-archive-keyring)" 3
    keyring_option=()
}

# choose_arch [NAME]: set `arch` to NAME, Debian's name of an architecture, or to this machine's.
choose_arch() {
    host_arch="$(uname -m)"
    case "$host_arch" in
        x86_64) host_arch=amd64 ;;
        aarch64) host_arch=arm64 ;;
    esac
    arch="${1:-$host_arch}"
    case "$arch" in
        amd64) machine=x86_64 ;;
        arm64) machine=aarch64 ;;
        *) fail "--arch '$arch': must be amd64 or arm64" 2 ;;
    esac
}

# need_emulator: stop unless programs of `arch` run here, by themselves or by QEMU's emulation of user programs.
need_emulator() {
    local handler="/proc/sys/fs/binfmt_misc/qemu-$machine"
    [ "$arch" != "$host_arch" ] || return 0
    # F: the kernel has the emulator open, so a chroot does not need it.
    if grep -q '^enabled' "$handler" 2>/dev/null && grep -q '^flags:.*F' "$handler"; then return 0; fi
    fail "programs for $arch do not run on this $host_arch machine; install their emulator with:
  apt-get install qemu-user-static
and where systemd does not run, register it as root:
  mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
  cat /usr/lib/binfmt.d/qemu-$machine.conf >/proc/sys/fs/binfmt_misc/register" 3
}

clean_up() {
    [ -n "$work" ] || return 0
    [ ! -e "$work/root" ] || as_root rm -rf --one-file-system "$work/root" || true
    rm -rf --one-file-system "$work"
}

# run COMMAND...: run it in its own process group, so that a signal to this script ends all of it at once.
run() {
    local status=0
    set -m
    "$@" &
    child=$!
    set +m
    wait "$child" || status=$?
    child=
    return "$status"
}

# stop STATUS: end the process group and this script; called by the trap of a signal.
stop() {
    trap '' HUP INT TERM
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    exit "$1"
}

# as_root COMMAND...: run it as the owner of the files that bootstrap made, in a user namespace unless this is root.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        mmdebstrap --unshare-helper "$@"
    fi
}

# A private folder for unfinished files, removed at every exit. Not under $HOME, which mmdebstrap's user namespace may
# not be able to read.
make_work() {
    trap clean_up EXIT
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
    work="$(mktemp -d "${TMPDIR:-/var/tmp}/${0##*/}.XXXXXXXX")"
    chmod 711 "$work"
}

joined() {
    local IFS=,
    printf '%s' "$*"
}

# sources SUITE MIRROR: the lines of sources.list that mmdebstrap uses.
sources() {
    # The second hook fails, which ends mmdebstrap before it has downloaded anything.
    mmdebstrap --variant=apt --format=null "${keyring_option[@]}" \
        --setup-hook="download /etc/apt/sources.list '$work/sources.list'" --setup-hook='exit 9' \
        "$1" /dev/null ${2:+"$2"} >"$work/sources.log" 2>&1 || true
    if [ ! -s "$work/sources.list" ]; then
        cat "$work/sources.log" >&2
        fail "mmdebstrap has no package source for $1; give one with --mirror URL"
    fi
    cat "$work/sources.list"
}

# resolve SUITE MIRROR PACKAGE...: prints name=version of all that a build now would install, sorted.
resolve() {
    local suite="$1" mirror="$2" lines root
    shift 2
    lines="$(sources "$suite" "$mirror")"
    # The package lists and the result are cached: for an unchanged archive this takes three small requests.
    root="$cache/apt/$(printf '%s\n' "$lines" "$arch" | sha256sum | cut -c 1-16)"
    mkdir -p "$root"/etc/apt/{apt.conf.d,preferences.d,sources.list.d} \
        "$root"/var/{lib/apt/lists/partial,cache/apt/archives/partial,lib/dpkg}
    (
        flock 9
        # Written only once: with a newer file apt would read all of its lists again.
        [ -e "$root/var/lib/dpkg/status" ] || : >"$root/var/lib/dpkg/status"
        printf '%s\n' "$lines" >"$root/etc/apt/sources.list"
        cat >"$root/apt.conf" <<EOF
Dir "$root/";
Dir::State::status "$root/var/lib/dpkg/status";
Dir::Etc::Trusted "$keyring";
Dir::Etc::TrustedParts "/etc/apt/trusted.gpg.d/";
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
EOF
        export APT_CONFIG="$root/apt.conf"
        # Its caches only help after a change, and then the next call makes them.
        apt-get -qq --error-on=any -o pkgCacheFile::Generate=false update >"$work/resolve.log" 2>&1 || exit
        # With the same lists, identified by these hashes, the same packages resolve to the same versions.
        known="$root/resolved/$({
            cat "$root"/var/lib/apt/lists/*Release
            stat -c '%n %s %Y' "$root"/var/lib/apt/lists/*_*
            printf '%s\n' "$suite" "$@"
        } | sha256sum | cut -c 1-32)"
        [ ! -s "$known" ] || exec cp "$known" "$work/resolved"
        apt-get -qq --print-uris install "?narrow(?codename(^$suite\$),?essential)" apt "$@" \
            >"$work/resolved" 2>>"$work/resolve.log" || exit
        mkdir -p "$root/resolved"
        find "$root/resolved" -type f -mtime +30 -delete
        cp "$work/resolved" "$work/known" && mv "$work/known" "$known"
    ) 9>"$root/lock" || {
        tail -n 20 "$work/resolve.log" >&2
        fail "apt could not resolve the packages for $suite"
    }
    # Lines: 'URL' NAME_VERSION_ARCHITECTURE.deb SIZE HASH. --simulate would take ten times as long.
    sed -n 's/^[^ ]* \([^_ ]*\)_\([^_ ]*\)_[^_ ]*\.deb .*/\1=\2/p' "$work/resolved" | sed 's/%3a/:/' | LC_ALL=C sort
}

# bootstrap NAME SUITE MIRROR PACKAGES OPTION...: a system of these packages in $work/root. Downloads are kept
# in the cache's folder NAME.
bootstrap() {
    local debs="$cache/debs/$1-$arch" suite="$2" mirror="$3" packages="$4"
    shift 4
    mkdir -p "$debs" "$work/debs"
    # Another build may do the same at this moment.
    find "$debs" -mindepth 1 -maxdepth 1 -ignore_readdir_race -mtime +30 -exec rm -rf {} +
    # shellcheck disable=SC2016
    run mmdebstrap --variant=apt --format=directory --architectures="$arch" --include="$packages" \
        "${keyring_option[@]}" \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/lintian/*' \
        --setup-hook='mkdir -p "$1/var/cache/apt/archives/partial"' \
        --setup-hook="sync-in '$debs' /var/cache/apt/archives" \
        --skip=essential/unlink \
        --customize-hook="sync-out /var/cache/apt/archives '$work/debs'" \
        "$@" "$suite" "$work/root" ${mirror:+"$mirror"} ||
        fail "mmdebstrap could not install $suite"
    # Rename each file, so that a parallel build sees complete files only.
    mkdir "$debs/new.$$"
    cp -p "$work"/debs/*.deb "$debs/new.$$"
    touch "$debs/new.$$"/*.deb
    mv -f "$debs/new.$$"/*.deb "$debs"
    rmdir "$debs/new.$$"
}

# shellcheck shell=bash
# Installs what the scripts need: system packages and the virtual environment. If nothing is missing, this takes a few
# milliseconds: a search for each program, and a comparison of the lock file with the installed one.
# It uses only features of bash 3.2, so that it can report what is missing on macOS too.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
venv="$root/.venv"
tools="$root/.cache/tools"
# Folders of the administrator's programs, which are not on other users' PATH.
PATH="$PATH:/usr/sbin:/sbin:$tools/usr/bin:$tools/usr/sbin"
work=

# set_up run|test: install what is missing for that, and print what is installed.
set_up() {
    local lock="$root/scripts/requirements.txt"
    [ "$1" = run ] || lock="$root/tests/requirements.txt"
    look_for_programs "$1"
    if [ ${#missing[@]} -eq 0 ] && venv_is_ready "$1" "$lock"; then
        return
    fi
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    work="$(mktemp -d)"
    exec 9<"$root"
    if command -v flock >/dev/null && ! flock -n 9; then
        say 'waiting for another set-up in this folder'
        flock 9
        look_for_programs "$1"
    fi
    look_for_python
    if [ ${#missing[@]} -gt 0 ]; then
        install_packages
    fi
    venv_is_ready "$1" "$lock" || fill_venv "$1" "$lock"
    exec 9<&-
    clean_up
    trap - EXIT INT TERM
}

say() { printf '==> %s\n' "$*" >&2; }

# stop: print stdin and exit with the status for a missing tool.
stop() {
    printf '%s: error: ' "${0##*/}" >&2
    cat >&2
    exit 3
}

clean_up() { [ -z "$work" ] || rm -rf "$work"; }

# quietly COMMAND...: run it with its output in $work/log, which the caller prints if it fails.
quietly() { "$@" </dev/null >"$work/log" 2>&1 9<&-; }

# look_for_programs run|test: fill `missing`, `packages` and `unpacked`.
look_for_programs() {
    local section='' program package
    missing=() packages=() unpacked=()
    while read -r program package; do
        case "$program" in
            '' | '#'*) ;;
            '['*)
                section="$program"
                [ "$1" = test ] || [ "$section" = '[run]' ] || break
                ;;
            /*) [ -e "$program" ] || lacks "$section" "$program" "$package" ;;
            *) command -v "$program" >/dev/null || lacks "$section" "$program" "$package" ;;
        esac
    done <"$root/scripts/packages.txt"
}

# lacks SECTION PROGRAM PACKAGE
lacks() {
    missing+=("$2")
    case "$1 ${packages[*]-} " in
        *" $3 "*) ;;
        '[unpacked] '*) unpacked+=("$3") ;;
        *) packages+=("$3") ;;
    esac
}

# look_for_python: set `python` to an interpreter outside virtual environments, and add what it lacks to `missing`.
look_for_python() {
    local each version
    python=
    for each in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if python="$("$each" -c 'import os, sys
assert sys.version_info >= (3, 11)
print(os.path.realpath(sys._base_executable))' 2>/dev/null)"; then
            break
        fi
        python=
    done
    if [ -n "$python" ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || {
            version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
            lacks '[run]' "Python's venv" "python$version-venv"
        }
    elif [ -z "${PYTHON:-}" ] && ! { command -v python3 && command -v apt-get; } >/dev/null; then
        lacks '[run]' python3 python3
        lacks '[run]' "Python's venv" python3-venv
    else
        stop <<EOF
Python 3.11 or newer is necessary, and ${PYTHON:-python3} is not. Nothing has been changed.
Install a newer one, and name it: PYTHON=python3.12 scripts/${0##*/}
EOF
    fi
}

# install_packages: install `packages` and unpack `unpacked`; if one does not exist, stop without a change.
install_packages() {
    local absent apt as_root=() refreshed=false
    # Do not even change APT's caches before it is certain that this can succeed.
    apt=(-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    command -v apt-get >/dev/null || no_package ${packages[@]+"${packages[@]}"} ${unpacked[@]+"${unpacked[@]}"}
    absent="$(without_candidate)"
    if [ -n "$absent" ]; then
        # The package lists may be missing or old. New ones are kept outside the system, which must not change on failure.
        refresh_lists
        absent="$(without_candidate)"
        # shellcheck disable=SC2086 # one package a word
        [ -z "$absent" ] || no_package $absent
    fi
    if [ ${#packages[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] || as_root=(sudo '--preserve-env=http_proxy,https_proxy,no_proxy')
        [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || stop <<EOF
system packages are missing, and without sudo only root can install them. Nothing has been changed.
As root: apt-get install --no-install-recommends ${packages[*]}
EOF
        say "installing system packages: ${packages[*]}"
        install || {
            # Packages of the lists may have been replaced since.
            ! $refreshed && refresh_lists && install
        } || apt_failed
    fi
    if [ ${#unpacked[@]} -gt 0 ]; then
        say "unpacking into ${tools#"$root/"}: ${unpacked[*]}"
        unpack || apt_failed
    fi
    [ -n "$python" ] || look_for_python
}

install() {
    quietly ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get "${apt[@]}" \
        -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "${packages[@]}"
}

unpack() {
    local file
    mkdir -p "$tools" "$work/debs"
    # APT downloads as its own user if it can.
    chmod 755 "$work" && chmod 777 "$work/debs"
    (cd "$work/debs" && quietly apt-get "${apt[@]}" -q download "${unpacked[@]}") || return
    for file in "$work"/debs/*.deb; do
        quietly dpkg-deb -x "$file" "$tools" || return
    done
}

# refresh_lists: fetch APT's lists into a separate folder, and set `apt` to use them.
refresh_lists() {
    local lists="$work/lists"
    say "downloading the package lists"
    mkdir -p "$lists"
    chmod 755 "$work"
    refreshed=true
    apt+=(-o "Dir::State::lists=$lists")
    quietly apt-get "${apt[@]}" -q update || apt_failed 'Nothing has been changed.'
}

# without_candidate: print the `packages` and `unpacked` for which APT has no version.
without_candidate() {
    local each known
    known=" $(LC_ALL=C apt-cache "${apt[@]}" policy \
        ${packages[@]+"${packages[@]}"} ${unpacked[@]+"${unpacked[@]}"} |
        sed -n -e '/^[^ ].*:$/{s/:$//;h;}' -e '/^ *Candidate: (none)/d' -e '/^ *Candidate: /{x;p;}' | tr '\n' ' ')"
    for each in ${packages[@]+"${packages[@]}"} ${unpacked[@]+"${unpacked[@]}"}; do
        case "$known" in
            *" $each "*) ;;
            *) printf '%s ' "$each" ;;
        esac
    done
}

# no_package PACKAGE...: stop with a list of what to install by hand.
no_package() {
    local each name=this
    # shellcheck source=/dev/null
    [ ! -e /etc/os-release ] || name="$(. /etc/os-release && echo "${PRETTY_NAME:-this}")"
    [ "$(uname)" != Darwin ] || name=macOS
    stop < <(
        echo "some programs are missing, and $name has no package for them. Nothing has been changed."
        for each; do
            if [ "$each" = packer ]; then
                echo "  Packer: install HashiCorp's official package, version 1.7 or newer:"
                echo "    developer.hashicorp.com/packer/install"
                echo "    ($(official_packer))"
            else
                echo "  $each (its name in Debian)"
            fi
        done
        command -v apt-get >/dev/null ||
            echo "Debian and Ubuntu have packages for everything but Packer; you can also use a virtual machine with one of them."
        echo "Then run this again. See the section \"Install\" of README.md."
    )
}

official_packer() {
    if command -v apt-get >/dev/null; then
        echo "the package \`packer\` of HashiCorp's APT repository"
    elif command -v dnf >/dev/null || command -v yum >/dev/null; then
        echo "the package \`packer\` of HashiCorp's RPM repository"
    elif [ "$(uname)" = Darwin ]; then
        echo "with Homebrew: brew install hashicorp/tap/packer"
    else
        echo "the binary for this system"
    fi
}

# apt_failed [REMARK]: print APT's output and stop.
apt_failed() {
    stop < <(
        echo "APT failed. ${1:-}"
        tail -n 15 "$work/log" | sed 's/^/  | /'
        echo "Check that this machine is online, and that APT's proxy is set (/etc/apt/apt.conf.d)."
        [ ${#packages[@]} -eq 0 ] ||
            echo "By hand: apt-get install --no-install-recommends ${packages[*]}"
    )
}

# venv_is_ready run|test LOCK: whether the virtual environment is complete, of this folder, and as in LOCK.
venv_is_ready() {
    local home=
    [ -x "$venv/bin/python" ] && [ ! -e "$venv/.unfinished" ] || return
    [ ! -e "$venv/.home" ] || read -r home <"$venv/.home"
    [ "$home" = "$root" ] && cmp -s "$2" "$venv/.$1.lock"
}

# fill_venv run|test LOCK: install the packages of LOCK, into a new environment if there is no complete one.
fill_venv() {
    local home="$root" packages_dir
    [ ! -e "$venv/.home" ] || read -r home <"$venv/.home"
    if [ -e "$venv/.unfinished" ] || [ "$home" != "$root" ] ||
        ! quietly "$venv/bin/python" -I -c 'import pip, sys; assert sys.version_info >= (3, 11)'; then
        say "making the virtual environment (.venv)"
        mkdir -p "$venv"
        : >"$venv/.unfinished"
        find "$venv" -mindepth 1 ! -name .unfinished -delete
        quietly "$python" -I -m venv "$venv" || python_failed
    fi
    : >"$venv/.unfinished"
    rm -f "$venv"/.run.lock "$venv"/.test.lock
    say "installing Python packages ($(grep -c '^[a-z].*==' "$2"), pinned by ${2#"$root/"})"
    # Do not compile: Python compiles what it imports, which is a small part.
    quietly "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-input --no-compile \
        --only-binary :all: --require-hashes -r "$2" || python_failed
    # The program runs from this folder, so nothing is copied.
    packages_dir="$("$venv/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\n' "$root" >"$packages_dir/ami-builder.pth"
    ln -sfn ../../scripts/ami-builder "$venv/bin/ami-builder"
    printf '%s\n' "$root" >"$venv/.home"
    cp "$2" "$venv/.$1.lock"
    # The tests' lock file includes the other one.
    [ "$1" = run ] || cp "$root/scripts/requirements.txt" "$venv/.run.lock"
    rm "$venv/.unfinished"
}

python_failed() {
    stop < <(
        echo "the virtual environment could not be made."
        tail -n 15 "$work/log" | sed 's/^/  | /'
        echo "Check that this machine is online. pip uses https_proxy, and PIP_INDEX_URL for a mirror."
        echo "Then run this again: it continues with what is complete."
    )
}

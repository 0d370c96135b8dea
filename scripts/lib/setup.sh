# shellcheck shell=bash
# Installs what the scripts need: system packages and the virtual environment. If nothing is missing, this takes a few
# milliseconds: a search for each program, and a comparison of the lock file with the installed one.
# It uses only features of bash 3.2, so that it can report what is missing on macOS too.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
venv="$root/.venv"
tools="$root/.cache/tools"
# Folders of the administrator's programs, which are not on other users' PATH.
PATH="$PATH:/usr/sbin:/sbin:$tools/usr/bin:$tools/usr/sbin:$tools/packer/bin"
work=

# set_up python|aws|local|test: install what is missing for that, and print what is installed.
set_up() {
    local kind=run lock="$root/scripts/requirements.txt"
    [ "$1" != test ] || kind=test lock="$root/tests/requirements.txt"
    case "$1" in
        aws) plugins=(amazon) ;;
        local) plugins=(qemu) ;;
        test) plugins=(qemu amazon) ;;
    esac
    look_for_programs "$1"
    if [ ${#missing[@]} -eq 0 ] && venv_is_ready "$kind" "$lock"; then
        name_plugins
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
    venv_is_ready "$kind" "$lock" || fill_venv "$kind" "$lock"
    exec 9<&-
    clean_up
    trap - EXIT INT TERM
    name_plugins
}

# name_plugins: let set-up's own Packer find its plugins. Packer 1.11 and later look into one folder only.
name_plugins() {
    if [ -z "${PACKER_PLUGIN_PATH:-}" ] && [ "$(command -v packer)" = "$tools/packer/bin/packer" ]; then
        export PACKER_PLUGIN_PATH="$tools/packer/plugins"
    fi
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

# look_for_programs python|aws|local|test: fill `missing`, `packages` and `unpacked`.
look_for_programs() {
    local section='' program package architecture=other
    missing=() packages=() unpacked=()
    case "$HOSTTYPE" in
        x86_64) architecture=amd64 ;;
        aarch64 | arm64) architecture=arm64 ;;
    esac
    while read -r program package; do
        case "$program" in
            '' | '#'*) ;;
            '['*)
                case "$1 $program" in
                    'python [aws]' | 'aws [local]' | 'local [test]') break ;;
                esac
                section="$program"
                ;;
            *)
                case "$section" in
                    "[$architecture]" | '[aws]' | '[local]' | '[test]' | '[unpacked]')
                        is_there "$program" || lacks "$section" "$program" "$package"
                        ;;
                esac
                ;;
        esac
    done <"$root/scripts/packages.txt"
}

# is_there PROGRAM|FILE[,FILE...]: whether one of them is on this host.
is_there() {
    local each
    case "$1" in
        packer) packer_is_ready ;;
        /*)
            for each in ${1//,/ }; do
                [ ! -e "$each" ] || return 0
            done
            return 1
            ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# packer_is_ready: whether there is a Packer; that of set-up must be the pinned one, with `plugins`.
packer_is_ready() {
    local each
    case "$(command -v packer)" in
        '') return 1 ;;
        "$tools/packer/bin/packer")
            for each in packer "${plugins[@]}"; do
                cmp -s "$root/scripts/packer.txt" "$tools/packer/$each.txt" || return
            done
            ;;
    esac
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
            lacks '[aws]' "Python's venv" "python$version-venv"
        }
    elif [ -z "${PYTHON:-}" ] && ! { command -v python3 && command -v apt-get; } >/dev/null; then
        lacks '[aws]' python3 python3
        lacks '[aws]' "Python's venv" python3-venv
    else
        stop <<EOF
Python 3.11 or newer is necessary, and ${PYTHON:-python3} is not. Nothing has been changed.
Install a newer one, and name it: PYTHON=python3.12 scripts/${0##*/}
EOF
    fi
}

# install_packages: install `packages` and unpack `unpacked`; if one does not exist, stop without a change.
install_packages() {
    local absent apt as_root=() refreshed=false fetch=false
    # Do not even change APT's caches before it is certain that this can succeed.
    apt=(-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    absent="$(without_candidate)"
    if [ -n "$absent" ] && command -v apt-get >/dev/null; then
        # The package lists may be missing or old. New ones are kept outside the system, which must not change on failure.
        # For Packer alone APT's network is not needed: the releases that are fetched may be there.
        if refresh_lists; then
            absent="$(without_candidate)"
        elif [ "$absent" != 'packer ' ]; then
            apt_failed 'Nothing has been changed.'
        fi
    fi
    case " $absent" in
        *' packer '*) leave_out_packer ;;
    esac
    # shellcheck disable=SC2086 # one package a word
    [ -z "$absent" ] || no_package $absent
    if [ ${#packages[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] || as_root=(sudo '--preserve-env=http_proxy,https_proxy,no_proxy')
        [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || stop <<EOF
system packages are missing, and without sudo only root can install them. Nothing has been changed.
As root: apt-get install --no-install-recommends ${packages[*]}
EOF
    fi
    # The network is used before the system changes, unless that brings Python first.
    ! $fetch || [ -z "$python" ] || fetch_packer 'Nothing has been changed.'
    if [ ${#packages[@]} -gt 0 ]; then
        say "installing system packages: ${packages[*]}"
        install || {
            # Packages of the lists may have been replaced since.
            ! $refreshed && { refresh_lists || apt_failed 'Nothing has been changed.'; } && install
        } || apt_failed
    fi
    if [ ${#unpacked[@]} -gt 0 ]; then
        say "unpacking into ${tools#"$root/"}: ${unpacked[*]}"
        unpack || apt_failed
    fi
    [ -n "$python" ] || look_for_python
    ! $fetch || fetch_packer
}

# leave_out_packer: take it out of `packages` and `absent`, because it is to be fetched.
leave_out_packer() {
    local each others=()
    for each in "${packages[@]}"; do
        [ "$each" = packer ] || others+=("$each")
    done
    packages=(${others[@]+"${others[@]}"})
    absent="${absent/packer /}"
    fetch=true
}

# fetch_packer [REMARK]: install HashiCorp's release, and `plugins`, into the tools folder.
fetch_packer() {
    local error
    error="$("$python" -I "$root/scripts/lib/packer_release.py" "$root" "${plugins[@]}" 9<&-)" || stop < <(
        echo "there is no package of Packer here, and HashiCorp's release could not be fetched. ${1:-}"
        printf '%s\n' "$error" | sed 's/^/  /'
    )
    fetch=false
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

# refresh_lists: fetch APT's lists into a separate folder, and set `apt` to use them if that succeeds.
refresh_lists() {
    local lists="$work/lists"
    say "downloading the package lists"
    mkdir -p "$lists"
    chmod 755 "$work"
    refreshed=true
    quietly apt-get "${apt[@]}" -o "Dir::State::lists=$lists" -q update || return
    apt+=(-o "Dir::State::lists=$lists")
}

# without_candidate: print the `packages` and `unpacked` for which APT has no version.
without_candidate() {
    local each known
    command -v apt-get >/dev/null || {
        printf '%s ' ${packages[@]+"${packages[@]}"} ${unpacked[@]+"${unpacked[@]}"}
        return
    }
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
    local name=this
    # shellcheck source=/dev/null
    [ ! -e /etc/os-release ] || name="$(. /etc/os-release && echo "${PRETTY_NAME:-this}")"
    [ "$(uname)" != Darwin ] || name=macOS
    stop < <(
        echo "some programs are missing, and $name has no package for them. Nothing has been changed."
        echo "Install them by hand (these are their packages in Debian):"
        printf '  %s\n' "$@"
        command -v apt-get >/dev/null ||
            echo "Debian 12 and 13, and Ubuntu 24.04 and later, have packages for all of them; a virtual machine will do."
        ! $fetch || echo "Packer is not among them: this fetches it from HashiCorp."
        echo "Then run this again. See the section \"Install\" of README.md."
        echo "To build an AMI, Python, Packer and ssh are enough: ${0##*/} build --target aws"
    )
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

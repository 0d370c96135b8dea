#!/bin/sh
# Set the layers of defence that are named on the command line, just before memory is measured for Dask. `off` undoes
# those of the image and comes first; `measured` makes memory.reserve what the system has mapped of files, and `follow`
# starts what memory.follow bakes.
# run.py reads /run/ami-builder-layers, which exists only if all of this succeeded.
#
# LAYERS_ROOT is a prefix of every path, for tests.
set -eu

root=${LAYERS_ROOT:-}
groups=$root/sys/fs/cgroup
vm=$root/proc/sys/vm
programs=$root/usr/local/sbin
units='ssh systemd-journald systemd-networkd systemd-logind dbus docker containerd'
LOGIN=33554432 # for the programs of a login, which no cgroup holds yet

# add_up CGROUP NAME...: set `used` to the sum of these values of its memory.stat, and add it to `all`
add_up() {
    stat=$groups/$1/memory.stat used=0
    shift
    while read -r name bytes; do
        case " $* " in *" $name "*) used=$((used + bytes)) ;; esac
    done <"$stat"
    all=$((all + used))
}

# protect PROPERTY: for each of the units, and for their slice, which a unit's protection can't exceed
protect() {
    all=0
    for unit in $units; do
        add_up "system.slice/$unit.service" anon file_mapped kernel
        systemctl set-property --runtime "$unit.service" "$1=$used"
    done
    systemctl set-property --runtime system.slice "$1=$all"
}

protect_all() {
    all=0
    for group in "$groups"/system.slice/*.service; do
        name=${group##*/}
        add_up "system.slice/$name" anon file_mapped kernel
        echo "$used" >"$group/memory.min"
    done
    systemctl set-property --runtime system.slice "MemoryMin=$all"
    add_up init.scope anon file_mapped kernel
    echo "$used" >"$groups/init.scope/memory.min"
    systemctl set-property --runtime user.slice "MemoryMin=$LOGIN"
}

total_kb() { sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' "$root/proc/meminfo"; }

zram() {
    modprobe zram num_devices=1
    echo $(($(total_kb) * 1024 / 4)) >"$root/sys/block/zram0/disksize"
    mkswap /dev/zram0
    swapon --priority 100 /dev/zram0
}

for layer in "$@"; do
    case $layer in
        off)
            echo 0 >"$root/sys/kernel/mm/lru_gen/min_ttl_ms"
            echo always >"$root/sys/kernel/mm/transparent_hugepage/enabled"
            echo 10 >"$vm/watermark_scale_factor"
            # The image's own come after this.
            [ ! -e "$programs/lower-watermark" ] || echo '#!/bin/sh' >"$programs/lower-watermark"
            sed -i 's/^oom_score=.*/oom_score=0/' "$programs/start-dask"
            ;;
        ttl) echo 1000 >"$root/sys/kernel/mm/lru_gen/min_ttl_ms" ;;
        ttl-*) echo "${layer#ttl-}" >"$root/sys/kernel/mm/lru_gen/min_ttl_ms" ;;
        protect) protect MemoryMin ;;
        protect-all) protect_all ;;
        low) protect MemoryLow ;;
        oom-score) ;; # in the Compose file
        watermark) echo 100 >"$vm/watermark_scale_factor" ;;
        min-free)
            kb=$(cat "$vm/min_free_kbytes")
            echo $((kb * 4)) >"$vm/min_free_kbytes"
            ;;
        low-free) echo $(($(total_kb) / 64)) >"$vm/min_free_kbytes" ;;
        madvise | never) echo "$layer" >"$root/sys/kernel/mm/transparent_hugepage/enabled" ;;
        zram) zram ;;
        measured)
            all=0
            for unit in $units; do add_up "system.slice/$unit.service" file_mapped; done
            sed -i "s/^reserve_bytes=.*/reserve_bytes=$all/; s/^reserve_millipercent=.*/reserve_millipercent=0/; s/^reserve_capped=.*/reserve_capped=/; s/^units=.*/units=/" "$programs/measure-memory"
            ;;
        follow)
            # shellcheck disable=SC2016 # start-dask expands it
            sed -i '/compare-memory" --start/s/^/: >"$state\/follows"; /' "$programs/start-dask"
            systemd-run --unit=dask-follow --property=SyslogIdentifier=dask "$programs/compare-memory" --follow
            ;;
        *)
            echo "unknown layer: $layer" >&2
            exit 2
            ;;
    esac
done
echo "$*" >"$root/run/ami-builder-layers"

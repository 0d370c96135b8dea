#!/bin/sh
# Runs inside the new system as the last step of its installation. $1: the time for new files.
set -eu
epoch="$1"
export LC_ALL=C.UTF-8

printf 'dask:x:1000:1000::/home/dask:/bin/bash\n' >>/etc/passwd
printf 'dask:x:1000:\n' >>/etc/group
printf 'dask:!::0:99999:7:::\n' >>/etc/shadow
install -d -o 1000 -g 1000 /home/dask

python3 -m venv --without-pip /opt/dask
pip="$(echo /usr/share/python-wheels/pip-*.whl)/pip"
/opt/dask/bin/python "$pip" --isolated -q --no-cache-dir install --no-index --no-deps \
    --require-hashes --no-compile --find-links /tmp/wheels -r /tmp/wheels/requirements.txt
dpkg --purge python3-pip-whl >/dev/null
# Unused at run time, and a sixth of the packages' size.
find /opt/dask/lib -type d -name tests -prune -exec rm -rf {} +

# .pyc files contain their source's time, so set it first. Python cannot write them later: the user is not root.
find /opt/dask -exec touch -h -d "@$epoch" {} +
python3 -m compileall -q -j 0 /opt/dask/lib
# Debian compiles what it installs, apart from ...
python3 -m compileall -q -j 0 "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

rm -rf /tmp/wheels /tmp/container-setup.sh /var/log/* /var/cache/* /var/lib/apt/lists/* /etc/hostname /etc/resolv.conf
: >/etc/hostname

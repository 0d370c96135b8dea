# shellcheck shell=sh
# AVAILABLE_MEMORY_FOR_DASK (bytes) of the running Dask, for login shells; see start-dask.
unset AVAILABLE_MEMORY_FOR_DASK
if [ -r /run/dask/memory.env ]; then
    # shellcheck source=/dev/null
    . /run/dask/memory.env
    export AVAILABLE_MEMORY_FOR_DASK
fi

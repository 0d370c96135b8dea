"""Load the preloads that the container's own YAML files configure.

The variable DASK_DISTRIBUTED__WORKER__PRELOAD replaces their list, so a Compose file that sets it names this
file too, and sets DASK_DISTRIBUTED__WORKER__PRELOAD_ARGV to []. The same with NANNY. They are loaded when the
worker or nanny starts, a little later than Dask would. Python 3.9, distributed 2023 and later.
"""

from __future__ import annotations

from typing import Any

# Dask imports this again for each nanny of a process.
_loaded: dict[int, list[Any]] = globals().get("_loaded", {})


async def dask_setup(server: Any) -> None:
    """Load and start the preloads of a worker or a nanny."""
    import dask.config
    from distributed import Nanny
    from distributed.preloading import process_preloads

    kind = "nanny" if isinstance(server, Nanny) else "worker"
    files = dask.config.merge(*dask.config.collect_yaml(dask.config.paths))
    names = dask.config.get(f"distributed.{kind}.preload", default=[], config=files)
    if not names:
        return
    arguments = dask.config.get(f"distributed.{kind}.preload-argv", default=[], config=files)
    found = list(process_preloads(server, names, arguments, file_dir=server.local_directory))
    _loaded[id(server)] = found
    for each in found:
        await each.start()


async def dask_teardown(server: Any) -> None:
    """Stop them."""
    for each in reversed(_loaded.pop(id(server), [])):
        await each.teardown()

"""A VM that is saved with its memory, and goes on from there: for tests that break one, each its own copy."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ami_builder.core.errors import BuildFailed
from ami_builder.core.records import Endpoint
from ami_builder.qemu.machine import VirtualMachine
from ami_builder.qemu.monitor import FAILURES
from ami_builder.system import processes

# For a gigabyte or two on a busy disk.
_SAVE_SECONDS = 300.0


class SavedVm(VirtualMachine):
    """A VM on a virtio disk, for QEMU can't save one with an NVMe disk.

    With `saved`, a file that `save` has written, the guest does not boot: it continues where it was saved,
    and so does its clock. The disk has to be a copy of the disk at that time, and all settings but the port
    have to be the same.
    """

    def __init__(self, *, saved: Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._saved = saved

    def __enter__(self) -> Endpoint:
        with ExitStack() as started:
            endpoint = super().__enter__()
            started.push(self.__exit__)
            if self._saved is not None:
                self._wait_for("loading a saved VM", lambda: self._state() != "inmigrate")
                self.execute("cont")
            started.pop_all()
        return endpoint

    def save(self, path: Path) -> None:
        """Stop the guest for good, and write its memory and its devices to a file for `saved`.

        The file belongs to the disk in its state of that time.
        """
        assert self._monitor is not None
        path.unlink(missing_ok=True)
        try:
            self._monitor.execute("stop")
            # QEMU's default limit is meant for a network.
            self._monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            self._monitor.execute("migrate", {"uri": f"exec:cat >{shlex.quote(str(path))}"})
            self._wait_for(f"saving {path}", self._written)
        except FAILURES as error:
            raise BuildFailed(f"the VM can't be saved: {error}", log=self._log) from error

    def _written(self) -> bool:
        assert self._monitor is not None
        migration = self._monitor.execute("query-migrate")
        assert isinstance(migration, dict)
        if migration["status"] == "failed":
            raise BuildFailed(f"the VM can't be saved: {migration.get('error-desc')}", log=self._log)
        return bool(migration["status"] == "completed")

    def _wait_for(self, what: str, done: Any) -> None:
        processes.wait_until(done, what=what, timeout=_SAVE_SECONDS, interval=0.1, log=self._log)

    def _start(self) -> None:
        if self._process is not None:  # it reboots
            self._saved = None
        super()._start()

    def _hangs(self) -> bool:
        return self._saved is None and super()._hangs()

    def _arguments(self, *, monitor: int) -> list[str]:
        argv = [
            each.replace("nvme,drive=root,", "virtio-blk-pci,drive=root,")
            for each in super()._arguments(monitor=monitor)
        ]
        if self._saved is not None:
            argv += ["-incoming", f"exec:cat {shlex.quote(str(self._saved))}"]
        return argv

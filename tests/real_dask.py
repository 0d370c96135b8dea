"""Dask's own commands on this machine: a scheduler and workers that end with the test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ami_builder.system.certificates import Certificate

PRELOAD = Path(__file__).parent / "process" / "dask_machine.py"
TLS_FILES = {"ca-file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}


@contextmanager
def dask(*arguments: str, log: Path, **environment: str) -> Iterator[Path]:
    """Run a real dask command until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            env={**os.environ, "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "info", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(120)


def said(log: Path, text: str) -> str:
    """Wait until a log has `text`, and return the log."""

    def look() -> str | None:
        found = log.read_text(encoding="utf-8")
        return found if text in found else None

    return processes.wait_until(look, what=f"{text!r} in {log}", timeout=300, interval=0.1)


def tls_flags(folder: Path) -> tuple[str, ...]:
    """Return the flags that let a dask command use the certificate in a folder."""
    return tuple(f"--tls-{name}={folder / file}" for name, file in TLS_FILES.items())


def tls_folder(folder: Path, issued: Certificate) -> Path:
    """Write a certificate with its key and its CA's certificate into a new folder, and return the folder."""
    folder.mkdir(parents=True)
    for name, text in (("ca.pem", issued.ca), ("cert.pem", issued.certificate), ("key.pem", issued.key)):
        (folder / name).write_text(text)
    return folder


def worker(
    folder: Path,
    address: str,
    name: str,
    *flags: str,
    total: int,
    available: int,
    instance: str = "",
    growth: str = "",
) -> AbstractContextManager[Path]:
    """Run a worker with one thread on a machine of its own, an EC2 instance or not; sizes are bytes."""
    machine = folder / name
    machine.mkdir()
    (machine / "boot_id").write_text(f"boot-of-{name}\n")
    held = 100 << 20  # about what a worker and its nanny hold
    lines = f"MemTotal: {total // 1024} kB\nMemAvailable: {(available - held) // 1024} kB\n"
    (machine / "meminfo").write_text(lines)
    if growth:
        (machine / "memory.json").write_text(growth)
    if instance:
        (machine / "sys_vendor").write_text("Amazon EC2\n")
        (machine / "board_asset_tag").write_text(f"{instance}\n")
    argv = ["worker", address, "--name", name, "--nthreads", "1", "--no-dashboard", *flags]
    argv += ["--preload", str(PRELOAD), "--local-directory", str(machine)]
    return dask(*argv, log=folder / f"{name}.log", TEST_MACHINE=str(machine))


@contextmanager
def scheduler(folder: Path, protocol: str = "tcp", *more: str) -> Iterator[str]:
    """Run a scheduler and yield its address."""
    log = folder / f"{protocol}.log"
    where = ("--host", f"{protocol}://127.0.0.1", "--port", "0", "--no-dashboard")
    with dask("scheduler", *where, *more, log=log):
        text = said(log, "Scheduler at:")
        found = re.search(rf"{protocol}://127\.0\.0\.1:\d+", text)
        assert found is not None, text
        yield found[0]

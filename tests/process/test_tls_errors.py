"""The preload that keeps a broken TLS connection from breaking others.

tests/vm/test_9_guest.py runs the same probe with the Python of the container, which breaks them.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ami_builder.system import resources
from ami_builder.system.certificates import Authority
from tests import tls_errors_probe
from tests.real_dask import tls_folder

if TYPE_CHECKING:
    from pathlib import Path

PRELOAD = resources.packer_dir() / "guest/usr/local/lib/dask/tls_errors.py"


STALE = """
import _ssl, contextlib, ctypes, runpy, socket, ssl, sys
for preload in sys.argv[1:]:
    runpy.run_path(preload)["dask_setup"](None)
closed = ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="a")
openssl = ctypes.CDLL(_ssl.__file__)
openssl.ERR_new()
openssl.ERR_set_error(2, 32, None)  # of the system, EPIPE
with contextlib.suppress(OSError):
    closed.send(b"x")
print("stale" if openssl.ERR_peek_error() else "empty")
"""


@pytest.mark.parametrize(("preloads", "queue"), [([], "stale"), ([PRELOAD], "empty")])
def test_an_error_leaves_nothing_in_the_queue(preloads: list[Path], queue: str) -> None:
    """What some Pythons leave there is put there: without the preload it stays, with every Python."""
    argv = [sys.executable, "-c", STALE, *map(str, preloads)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{queue}\n"


def test_connections_work_with_it(tmp_path: Path) -> None:
    folder = tls_folder(tmp_path / "tls", Authority.create(days=2).issue("worker", days=1, serves=True))
    argv = [sys.executable, tls_errors_probe.__file__, str(folder), str(PRELOAD)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "whole\n"

"""The preload that keeps a broken TLS connection from breaking others, with this Python.

tests/vm/test_9_guest.py does the same with that of the container, which breaks them.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from ami_builder.system import resources
from ami_builder.system.certificates import Authority
from tests import tls_errors_probe
from tests.real_dask import tls_folder

if TYPE_CHECKING:
    from pathlib import Path

PRELOAD = resources.packer_dir() / "guest/usr/local/lib/dask/tls_errors.py"


def test_a_broken_connection_breaks_no_other(tmp_path: Path) -> None:
    folder = tls_folder(tmp_path / "tls", Authority.create(days=2).issue("worker", days=1, serves=True))
    argv = [sys.executable, tls_errors_probe.__file__, str(folder), str(PRELOAD)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "whole\n"

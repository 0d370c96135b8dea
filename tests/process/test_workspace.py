"""A run that is killed, and the workspace after it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from ami_builder.core.records import RunRecord, RunStatus
from ami_builder.state.workspace import load

if TYPE_CHECKING:
    from ami_builder.state.workspace import Workspace


def test_a_killed_run_is_swept_and_a_living_one_is_not(workspace: Workspace) -> None:
    program = (
        "import os, sys\n"
        "from ami_builder.state.workspace import Workspace\n"
        "w = Workspace.open({'AMI_BUILDER_HOME': sys.argv[1]})\n"
        "with w.run('build', 'dask') as run:\n"
        "    (run.work / 'overlay.qcow2').write_text('x')\n"
        "    def half(folder):\n"
        "        (folder / 'disk').write_text('half')\n"
        "        os.kill(os.getpid(), 9)\n"
        "    w.cached('base', 'd1', half)\n"
    )
    home = str(workspace.state.parent)
    subprocess.run([sys.executable, "-c", program, home], check=False)
    (killed,) = workspace.runs_dir.iterdir()
    assert (killed / "work" / "overlay.qcow2").exists()
    with workspace.run("build", "dask") as living:
        assert workspace.sweep() == (killed.name,)
        assert living.work.exists()
    assert not (killed / "work").exists()
    record = load(RunRecord, killed / "record.json")
    assert record is not None
    assert record.status is RunStatus.INTERRUPTED
    assert not (workspace.cache / "base" / "d1").exists()
    assert not list((workspace.cache / "base").glob("*.half"))
    assert workspace.cached("base", "d1", lambda f: None) == workspace.cache / "base" / "d1"

"""Real nights: the shared image is promoted; then everything that goes into it is somebody else's.

A cloud image by URL, a container from a registry, two workers on a smaller machine than the other tests',
since the promise holds for every number and size. The gate holds that image, a person promotes it, takes it
back, and prunes it.

The base disk of our own recipe stands in for a cloud image (no other can be had offline); it goes the whole
foreign way: HTTP, checksum, UEFI, a NoCloud seed for baking, and NoCloud again for verification.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from ami_builder.state.journal import unfinished
from tests.vm.conftest import GIB, ROOT, ami_builder
from tests.vm.registry import push, registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.state.workspace import Workspace


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _config(folder: Path, url: str, checksum: str, port: int) -> Path:
    path = folder / "ami-builder.toml"
    path.write_text(
        f"""
[images.dask.base]
source = "{url}/disk.qcow2"
checksum = "{checksum}"
ssh_user = "admin"

[images.dask.container]
source = "registry"
reference = "10.0.2.2:{port}/team/dask:test"
insecure_registry = "10.0.2.2:{port}"

[images.dask.dask]
workers = 2

[images.dask.verify]
datasource = "nocloud"
pressure = false
memory = ["1536MiB"]
"""
    )
    return path


def _night(config: Path, status: int) -> dict[str, Any]:
    """Run a night, and return what it tells."""
    answer = ami_builder("--config", config, "nightly", "--no-prune", "--json")
    assert answer.status == status, answer.stderr
    (found,) = answer.json["nights"]
    return dict(found)


def _standing() -> str | None:
    """Return the digest that stands in the channel."""
    found: str | None = ami_builder("history", "testing", "--json").json["standing"]
    return found


def test_nights_from_the_first_promotion_to_pruning(
    built: Mapping[str, Any], workspace: Workspace, tmp_path: Path
) -> None:
    ours = ROOT / "ami-builder.toml"
    first = _night(ours, 0)
    assert first["ending"] == "promoted"
    assert _standing() == built["artifact"]["digest"] == first["digest"]
    assert _night(ours, 0)["ending"] == "unchanged"

    base = next(p for p in sorted((workspace.cache / "base").glob("*/disk.qcow2")))
    archive = next(p for p in sorted((workspace.cache / "container").glob("*/container.tar")))
    with base.open("rb") as file:
        checksum = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    with _served(base.parent) as url, registry(tmp_path) as port:
        push(archive, port, "team/dask", "test")
        failed = _night(_config(tmp_path, url, "sha256:" + "0" * 64, port), 4)
        assert "wrong checksum" in failed["error"]
        assert not any("bake" in step["name"] for step in failed["steps"])
        foreign = _config(tmp_path, url, checksum, port)
        held = _night(foreign, 9)

    image = workspace.image("dask", held["digest"])
    assert image is not None
    assert image.verdict is not None
    assert image.verdict.passed
    measured = {m.phase: m for m in image.verdict.measured}
    assert set(measured) == {"boot", "restart", "reboot"}
    assert all(0 < m.available < m.total == 3 * GIB // 2 for m in measured.values())
    for phase in ("boot", "reboot"):
        ssh, dask = measured[phase].ssh_seconds, measured[phase].dask_seconds
        assert ssh is not None
        assert dask is not None
        assert 0 < ssh < dask
    assert any("2 GiB" in drift for drift in held["drifts"]), held["drifts"]
    assert _standing() == first["digest"] == held["before"]

    assert ami_builder("promote", held["digest"], "testing", "--reason", "smaller is enough").status == 0
    assert _night(foreign, 0)["ending"] == "unchanged"
    assert ami_builder("rollback", "testing", "--reason", "to see it held").status == 0
    assert _standing() == first["digest"]
    again = _night(foreign, 9)
    assert "to see it held" in again["drifts"][0]
    assert _standing() == first["digest"]

    assert ami_builder("revoke", held["digest"], "--reason", "a test is over").status == 0
    pruned = ami_builder("--set", "lifecycle.keep_days=0", "prune", "--apply", "--json")
    assert pruned.status == 0, pruned.stderr
    assert not image.path.exists()
    assert Path(built["artifact"]["location"]).exists()
    assert not list(unfinished(workspace))
    assert ami_builder("build", "--json").json["unchanged"] is True
    latest = workspace.nightly_dir / "dask.qemu" / "latest"
    assert ami_builder("report").stdout.strip() == str(latest.resolve() / "report.html")

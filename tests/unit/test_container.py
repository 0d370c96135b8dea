"""Where the container is built, what the baking machine gets for that, and what is known of it before."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ami_builder.build import container
from ami_builder.config.schema import Image, ImageSettings
from ami_builder.console import Mode, open_progress
from ami_builder.core.options import ContainerSource
from ami_builder.core.records import TargetKind
from ami_builder.state.workspace import Workspace
from ami_builder.system import processes, resources


def image(source: ContainerSource, **container: object) -> Image:
    values = {"container.source": source, **{f"container.{k}": v for k, v in container.items()}}
    return ImageSettings().overlaid(values).image("dask")


def test_only_auto_depends_on_the_target() -> None:
    auto = ImageSettings()
    assert auto.image("dask", TargetKind.QEMU).container.source is ContainerSource.ARCHIVE
    assert auto.image("dask", TargetKind.AWS).container.source is ContainerSource.MACHINE
    for source in set(ContainerSource) - {ContainerSource.AUTO}:
        settings = auto.overlaid({"container.source": source})
        assert {settings.image("dask", one).container.source for one in TargetKind} == {source}


def test_what_the_baking_machine_builds_is_known_without_a_program(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "stream", None)
    built = image(ContainerSource.MACHINE)
    before = container.digest(built, workspace, refresh=True)
    # The same file at another place, as on another host.
    copy = tmp_path / "copy" / "requirements.txt"
    copy.parent.mkdir()
    copy.write_bytes(resources.requirements().read_bytes())
    copied = replace(built, container=replace(built.container, requirements=copy))
    assert container.digest(copied, workspace, refresh=True) == before
    copy.write_text("dask==1 --hash=sha256:0\n")
    assert container.digest(copied, workspace, refresh=True) != before
    other = image(ContainerSource.MACHINE, packages=("libgomp1",))
    assert container.digest(other, workspace, refresh=True) != before


def test_the_baking_machine_gets_the_scripts_and_how_to_call_them(workspace: Workspace) -> None:
    built = image(ContainerSource.MACHINE, packages=("libgomp1",), reference="team/dask:1")
    with workspace.run("build", "dask", "digest") as run, open_progress(Mode.QUIET) as progress:
        with progress.step("container") as step:
            file = container.prepare(built, "digest", workspace, run, step)
        assert file is not None
        content = file.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {member.name for member in tar if not member.mode & 0o100} == {"requirements"}
    scripts = resources.scripts_dir()
    for name in ("container-archive", "lib/debian.sh", "lib/container-setup.sh"):
        assert files[name] == (scripts / name).read_bytes()
    assert files["requirements"] == resources.requirements().read_bytes()
    *_, command = files["build"].decode().splitlines()
    words = shlex.split(command)
    assert words[:2] == ["exec", "./container-archive"]
    assert words[-2:] == ["--output", "$1"]
    for pair in ("--reference team/dask:1", "--package libgomp1", "--requirements requirements"):
        assert pair in command
    variables = container.variables(built)
    assert variables["container_recipe"] == f"/var/tmp/{file.name}"
    assert variables["container_archive"] == container.UPLOADED


@pytest.mark.parametrize("source", list(ContainerSource))
def test_only_what_is_built_there_has_a_recipe(source: ContainerSource) -> None:
    variables = json.loads(json.dumps(container.variables(image(source), "/dev/disk")))
    assert bool(variables["container_recipe"]) == (source is ContainerSource.MACHINE)
    assert bool(variables["container_archive"]) == (source is not ContainerSource.REGISTRY)

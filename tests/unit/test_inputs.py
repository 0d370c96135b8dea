"""The digest of everything that decides about an image's content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ami_builder.build import inputs
from ami_builder.config.schema import Image, ImageSettings
from ami_builder.core.options import ContainerSource
from ami_builder.qemu.target import QemuTarget
from ami_builder.state.workspace import Workspace

SETTINGS = ImageSettings().overlaid(
    {
        "base.source": "/cloud.qcow2",
        "base.checksum": "sha256:" + "ab" * 32,
        "container.source": ContainerSource.REGISTRY,
        "container.reference": "registry.example.org/dask:1",
    }
)


def digest(image: Image, tmp_path: Path) -> str:
    workspace = Workspace(cache=tmp_path / "cache", state=tmp_path / "state")
    return QemuTarget(workspace=workspace).gather(image, refresh=False).digest


def test_a_release_by_itself_is_not_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(SETTINGS.image("dask"), tmp_path)
    monkeypatch.setattr(inputs, "__version__", "99", raising=False)
    assert digest(SETTINGS.image("dask"), tmp_path) == before
    monkeypatch.setattr(inputs, "RECIPE_VERSION", inputs.RECIPE_VERSION + 1)
    assert digest(SETTINGS.image("dask"), tmp_path) != before


def test_what_decides_about_the_content_is_another_image(tmp_path: Path) -> None:
    image = SETTINGS.image("dask")
    before = digest(image, tmp_path)
    same = SETTINGS.overlaid({"description": "x", "bake.cpus": 8, "verify.cpus": 8, "aws.spot": True})
    assert digest(same.image("dask"), tmp_path) == before
    other = replace(image.base, checksum="sha256:" + "cd" * 32)
    for changed in (
        SETTINGS.overlaid({"dask.workers": 2}).image("dask"),
        replace(image, base=other),
        replace(image, name="another"),
    ):
        assert digest(changed, tmp_path) != before

"""The README shows what is true: its commands exist, its example loads, its tree is the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ami_builder.cli.app import app, config_app
from ami_builder.config import loading
from ami_builder.core import errors
from ami_builder.nightly import webhook
from tests.unit.experiments import recorded, told

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_table_are_the_commands() -> None:
    table = README.split("## Commands")[1].split("##")[0]
    shown = set(re.findall(r"`([\w-]+(?: [a-z]+)?)", "\n".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    there = {c.name or str(c.callback.__name__) for c in app.registered_commands if c.callback}
    there |= {f"config {c.name}" for c in config_app.registered_commands}
    assert shown - {"command"} == there


def test_the_exit_codes_are_the_exit_codes() -> None:
    sentence = README.split("Exit codes:")[1].split(".")[0]
    shown = {int(code) for code in re.findall(r"\b(\d+) ", sentence)}
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)
             and issubclass(kind, (errors.AmiBuilderError, errors.Interrupted))}  # fmt: skip
    assert shown == {0, *codes}


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    path = tmp_path / "ami-builder.toml"
    path.write_text(example.replace("sha256:0123…", "sha256:" + "0" * 64), encoding="utf-8")
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "test_ours.py").write_text("")
    image = loading.load(path, environ={}).select()
    assert image.name == "prod"
    assert image.reserve.percent == 5
    assert image.container.requirements is None


@pytest.mark.parametrize(
    "name", re.findall(r"^(?: {4}| {6})(\w[\w/.*-]+)", README.split("## Architecture")[1], re.M)
)
def test_the_tree_is_the_tree(name: str) -> None:
    places = (ROOT, ROOT / "packer", ROOT / "scripts", ROOT / "ami_builder")
    pattern = name.replace("NN-*", "*")
    assert any(list(place.glob(pattern.rstrip("/"))) for place in places), name


NIGHTS = README.split("## Run it every night")[1].split("\n## ")[0]


def test_the_files_that_a_timer_needs_are_there() -> None:
    named = re.findall(r"/opt/ami-builder/([\w./@-]+)", NIGHTS)
    assert "scripts/systemd/ami-builder-nightly@.timer" in named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_set_up_makes_what_the_service_names() -> None:
    service = (ROOT / "scripts" / "systemd" / "ami-builder-nightly@.service").read_text(encoding="utf-8")
    for path in re.findall(r"=-?(?:webhook:)?(/etc/ami-builder[\w./]*)", service):
        assert f"{path}   " in NIGHTS or f"-d {path} " in NIGHTS, path
    assert "useradd --system" in NIGHTS
    for block in re.findall(r"```sh\n(.*?)```", NIGHTS, re.S):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_crontab_is_one() -> None:
    (crontab,) = re.findall(r"```crontab\n(.*?)```", NIGHTS, re.S)
    setting, line = crontab.splitlines()
    assert setting.startswith(f"{webhook.FILE_VARIABLE}=/")
    minute, hour, *every, command = line.split(maxsplit=5)
    assert int(minute) < 60
    assert int(hour) < 24
    assert every == ["*"] * 3
    # cron takes % for a line's end.
    assert "%" not in command
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_the_codes_of_a_night_are_what_the_service_acts_on() -> None:
    service = (ROOT / "scripts" / "systemd" / "ami-builder-nightly@.service").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \| .* \| (\w+)", NIGHTS, re.M)
    does = {code: deed for codes, deed in rows for code in codes.split(", ")}
    (final,) = re.findall(r"^RestartPreventExitStatus=(.*)", service, re.M)
    assert {code for code, deed in does.items() if deed == "fails"} == set(final.split())
    assert {code for code, deed in does.items() if deed == "tries"} == {"6", "7", "10"}


def test_what_the_experiment_came_to_is_what_was_recorded() -> None:
    section = README.split("## What the limit changes")[1].split("\n## ")[0].splitlines()
    lines = tuple(told(recorded()))
    assert [line for line in lines if line not in section] == []
    assert [line for line in section if re.match(r"\| \d+ GiB|.*\*\* \|", line) and line not in lines] == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_limits_has_equal_numbers() -> None:
    """Its rows are held by tests/vm/test_9_ec2cluster.py, which makes it."""
    lines = (ROOT / "docs" / "limits.md").read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| started by |"))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines[begin + 2 :] if line[:1] == "|"
    ]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) >= 8
    for _, _, variable, asked, maximum, worker in rows:
        assert variable == maximum
        assert asked in ("nothing", variable)
        assert worker in ("none, a scheduler", variable)

"""README and docs are true: commands and files exist, examples load, links resolve, pages are current."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from ami_builder.cli.app import app, config_app
from ami_builder.config import loading
from ami_builder.nightly import webhook

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + PAGES


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub and Zensical make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[ ]+", "-", each) for each in plain}


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_one_page() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 150


def test_generated_pages_are_current(generate: ModuleType) -> None:
    for path, text in generate.pages().items():
        assert read(path) == text.rstrip() + "\n", f"run python docs/generate.py: {name(path)} is old"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_resolve(path: Path) -> None:
    text = read(path)
    pictures = [(target, "") for target in re.findall(r'<img src="([^"]+)"', text)]
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text)
    for target, anchor in links + pictures:
        page = (path.parent / target) if target else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(read(page)), f"{target}#{anchor}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_commands_exist(path: Path) -> None:
    there = {c.name for c in app.registered_commands} | {"config"}
    there |= {f"config {c.name}" for c in config_app.registered_commands}
    shown = re.findall(
        r"^(?:scripts/)?ami-builder((?: --set \S+| --?\w+)* )(\w[\w-]*)", "\n".join(_code(read(path))), re.M
    )
    removed = {"experiment"} if path.name == "CHANGELOG.md" else set()
    assert {command for _, command in shown} - removed <= there


def _code(text: str) -> list[str]:
    lines = [line for each in (*blocks(text, "sh"), *blocks(text, "text")) for line in each.splitlines()]
    return [*lines, *re.findall(r"`((?:scripts/)?ami-builder [^`]+)`", text)]


EXAMPLES = [(path, text) for path in TEXTS for text in blocks(read(path), "toml")]


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=lambda n: f"{name(EXAMPLES[n][0])}-{n}")
def test_examples_of_the_configuration_load(tmp_path: Path, number: int) -> None:
    text = EXAMPLES[number][1].replace("0123…", "0" * 64)
    for folder in ("checks", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "checks" / "test_ours.py").touch()
    (tmp_path / "our-requirements.txt").write_text("dask==2026.8.0 --hash=sha256:" + "0" * 64 + "\n")
    path = tmp_path / "ami-builder.toml"
    path.write_text(text, encoding="utf-8")
    loading.load(path, environ={}).select()


def test_the_navigation_has_every_page() -> None:
    project = tomllib.loads(read(ROOT / "zensical.toml"))["project"]
    assert sorted(re.findall(r"[\w/-]+\.md", str(project["nav"]))) == [
        str(p.relative_to(DOCS)) for p in PAGES
    ]
    urls = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["urls"]
    assert (project["repo_url"], project["site_url"]) == (urls["Homepage"], urls["Documentation"])


ARCHITECTURE = read(DOCS / "explanation" / "architecture.md")


def test_the_map_of_folders_is_true() -> None:
    (tree,) = (text for text in blocks(ARCHITECTURE, "text") if "ami_builder/" in text)
    folder = ROOT
    shown: set[str] = set()
    for indent, path in re.findall(r"^( *)(\S+)", tree, re.M):
        if not indent:
            folder = ROOT / path
        found = list((folder if indent else ROOT).glob(path.rstrip("/")))
        assert found, path
        shown.add(str(found[0].relative_to(ROOT)))
    packages = {f"ami_builder/{p.parent.name}" for p in (ROOT / "ami_builder").glob("*/__init__.py")}
    assert packages <= shown


def test_files_that_docs_name_exist() -> None:
    for path in TEXTS:
        text = "".join(part for part in re.split(r"^```.*?^```", read(path), flags=re.S | re.M))
        for file in re.findall(r"`((?:ami_builder|tests|scripts|packer|docs|\.github)/[\w./@*-]*)`", text):
            assert list(ROOT.glob(file.rstrip("/"))), f"{name(path)}: {file}"


NIGHTLY = read(DOCS / "how-to" / "nightly.md")
SERVICE = read(ROOT / "scripts" / "systemd" / "ami-builder-nightly@.service")


def test_the_set_up_makes_what_the_service_names() -> None:
    named = re.findall(r"/opt/ami-builder/([\w./@-]+)", NIGHTLY)
    assert "scripts/systemd/ami-builder-nightly@.timer" in named
    for file in named:
        assert (ROOT / file).exists(), file
    for path in re.findall(r"=-?(?:webhook:)?(/etc/ami-builder[\w./]*)", SERVICE):
        assert f"{path}   " in NIGHTLY or f"-d {path} " in NIGHTLY, path
    assert "useradd --system" in NIGHTLY


def test_shell_examples_parse() -> None:
    for path in TEXTS:
        for block in blocks(read(path), "sh"):
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_crontab_is_one() -> None:
    (crontab,) = blocks(NIGHTLY, "crontab")
    setting, line = crontab.splitlines()
    assert setting.startswith(f"{webhook.FILE_VARIABLE}=/")
    minute, hour, *every, command = line.split(maxsplit=5)
    assert int(minute) < 60
    assert int(hour) < 24
    assert every == ["*"] * 3
    # cron takes % for a line's end.
    assert "%" not in command
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_the_service_acts_on_exit_codes_as_the_table_says() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| .* \| (\w+)", NIGHTLY, re.M)
    does = {code: deed for codes, deed in rows for code in codes.split(", ")}
    (final,) = re.findall(r"^RestartPreventExitStatus=(.*)", SERVICE, re.M)
    assert {code for code, deed in does.items() if deed == "fails"} == set(final.split())
    assert {code for code, deed in does.items() if deed == "tries"} == {"6", "7", "10"}


def test_the_table_of_limits_has_equal_numbers() -> None:
    """Its rows are held by tests/vm/test_9_ec2cluster.py, which makes it."""
    lines = read(DOCS / "explanation" / "limits.md").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| started by |"))
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in lines[begin + 2 :] if line[:1] == "|"
    ]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) >= 8
    for _, _, variable, asked, maximum, worker in rows:
        assert variable == maximum
        assert asked in ("nothing", variable)
        assert worker in ("none, a scheduler", variable)

"""What the EC2 on loopback imitates is cited in behaviours.toml, and what is cited there is imitated."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CITED: dict[str, dict[str, Any]] = tomllib.loads((HERE / "behaviours.toml").read_text())
SOURCES = [path for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_")]
_COMMENT = re.compile(r"# behaviour: ([\w-]+)")


def behaviours(text: str) -> set[str]:
    """Return the behaviours that a module's comments name."""
    return set(_COMMENT.findall(text))


def errors(text: str) -> Iterator[str]:
    """Yield the error codes that a module writes as literals in `Refused(...)`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refused":
            code = next((k.value for k in node.keywords if k.arg == "code"), *node.args[:1])
            if isinstance(code, ast.Constant):
                yield str(code.value)


def test_every_behaviour_that_the_code_names_is_cited_and_the_reverse() -> None:
    named = set().union(*(behaviours(path.read_text()) for path in SOURCES))
    assert sorted(named - CITED["behaviour"].keys()) == [], "missing in behaviours.toml"
    assert sorted(CITED["behaviour"].keys() - named) == [], "no code imitates it"


def test_every_error_code_is_cited() -> None:
    used = {code for path in SOURCES for code in errors(path.read_text())}
    assert sorted(used - CITED["error"].keys()) == []


def test_every_entry_is_whole_and_its_source_is_public() -> None:
    assert CITED.keys() == {"behaviour", "error"}
    for kind, says in (("behaviour", "does"), ("error", "means")):
        for name, entry in CITED[kind].items():
            assert entry.keys() == {says, "source"}, name
            assert entry[says].endswith("."), name
            assert entry["source"].startswith("https://"), name


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ('raise Refused("A.B", "why")', ["A.B"]),
        ('return Refused("A", f"{x}", 403)', ["A"]),
        ('Refused(code="B", message="why")', ["B"]),
        ("Refused(error.code, error.message)", []),
        ('Other("C")', []),
    ],
)
def test_error_codes_are_read_from_the_code(text: str, codes: list[str]) -> None:
    assert list(errors(text)) == codes
    assert behaviours(f"x = 1  # behaviour: some-id\n{text}") == {"some-id"}

"""The line of every key in a TOML file, held against tomllib's and tomlkit's idea of the same file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from ami_builder.config.toml_lines import KeyPath, dotted, key_lines, line_of

# QQQ stands for three apostrophes.
EVERYTHING = r'''# [not.a.table]
top = 1 # top2 = 2
"quoted key" = "a # b = c"
'single' = ["x", # comment, with "quotes" and ]
  [ "y", { deep = 1, other.one = [2] } ],
  """multi
  fake = 1
  ]""",
  'last',
]
a.b . "c.d" = 1.5
text = """
[fake.table]
with \""" and quotes""""" # five
raw = QQQ
fake = "1"
it's raw''QQQ
date = 1979-05-27 07:32:00

[ table . "x\u0041" ]
key={a=1,b={c=2}}
empty = []
[[list]]
name = "one"
[[list]]
name = "two"
[table.after]
last = true'''.replace("QQQ", "'" * 3)


def test_every_kind_of_key_and_value() -> None:
    tomllib.loads(EVERYTHING)
    lines = EVERYTHING.splitlines()

    def number(start: str) -> int:
        return next(n for n, line in enumerate(lines, 1) if line.startswith(start))

    table = number("[ table")
    assert dict(key_lines(EVERYTHING)) == {
        ("top",): 2,
        ("quoted key",): 3,
        ("single",): 4,
        ("single", 0): 4,
        ("single", 1): 5,
        ("single", 1, 0): 5,
        ("single", 1, 1): 5,
        ("single", 1, 1, "deep"): 5,
        ("single", 1, 1, "other"): 5,
        ("single", 1, 1, "other", "one"): 5,
        ("single", 1, 1, "other", "one", 0): 5,
        ("single", 2): 6,
        ("single", 3): 9,
        ("a",): 11,
        ("a", "b"): 11,
        ("a", "b", "c.d"): 11,
        ("text",): 12,
        ("raw",): number("raw"),
        ("date",): number("date"),
        ("table",): table,
        ("table", "xA"): table,
        ("table", "xA", "key"): table + 1,
        ("table", "xA", "key", "a"): table + 1,
        ("table", "xA", "key", "b"): table + 1,
        ("table", "xA", "key", "b", "c"): table + 1,
        ("table", "xA", "empty"): table + 2,
        ("list",): number("[[list"),
        ("list", "name"): number("[[list") + 1,
        ("table", "after"): number("[table.after"),
        ("table", "after", "last"): number("[table.after") + 1,
    }


@pytest.mark.parametrize("text", ["", "\n", "# only a comment", "\r\n\r\na = 1\r\n"])
def test_little_files(text: str) -> None:
    assert dict(key_lines(text)) == ({("a",): 3} if "a =" in text else {})


def test_the_line_around_what_is_not_there() -> None:
    lines = key_lines("\n[a.b]\nc = 1\n")
    assert line_of(lines, ("a", "b", "c")) == 3
    assert line_of(lines, ("a", "b", "other", "deeper")) == 2
    assert line_of(lines, ("elsewhere",)) == 1


def test_paths_are_written_as_in_toml() -> None:
    assert dotted(("images", "my.image", "checks", 1)) == 'images."my.image".checks[1]'


keys = st.text(st.sampled_from("ab.-_ \"'#=[]é\\"), max_size=4)
leaves = (
    st.integers(-(2**40), 2**40)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.dates()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
    | st.text(st.sampled_from("\"'\\\n#=[]{},. "), max_size=8)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield every path of parsed TOML, but none into arrays of tables, which have two forms."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            yield (*path, key)
            yield from _paths(inner, (*path, key))


@settings(deadline=None)
@given(st.dictionaries(keys, values, max_size=5))
def test_every_key_of_any_file_is_found_in_its_order(content: dict[str, Any]) -> None:
    text = tomlkit.dumps(content)
    parsed = tomllib.loads(text)
    lines = key_lines(text)
    for path in _paths(parsed):
        assert path in lines
        assert 1 <= lines[path] <= text.count("\n") + 1
    # Whatever is cut off behind a key's line, the key is still there; without its line it no longer is.
    for path, line in lines.items():
        before = "\n".join(text.split("\n")[: line - 1])
        try:
            earlier = tomllib.loads(before)
        except tomllib.TOMLDecodeError:
            continue
        assert not _has(earlier, path)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _has(value: Any, path: KeyPath) -> bool:
    for part in path:
        if part not in (value if isinstance(value, dict) else range(_length(value))):
            return False
        value = value[part]
    return True

"""The shipped ami-builder.toml, the JSON schema and the reference page, made from the declared settings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from ami_builder.config import schema
from ami_builder.config.schema import SETTINGS, ConfigFile, ImageSettings

_WIDTH = 110


def table_description(table: str) -> str:
    """Return what a table such as `memory` is about."""
    return _summary(type(getattr(ImageSettings(), table)))


def to_toml(value: object) -> str:
    """Return text, a number, a truth value or a list of them as TOML has it."""
    return json.dumps(value, ensure_ascii=False)


def example_file(*, schema_path: str = "") -> str:
    """Return an ami-builder.toml with every setting, commented out, with its default.

    With `schema_path`, editors find the JSON schema there.
    """
    lines, table = [f"#:schema {schema_path}\n\n{_HEAD}" if schema_path else _HEAD], ""
    for key, setting in SETTINGS.items():
        if setting.table != table:
            table = setting.table
            lines += ["", *_comment(table_description(table)), f"[images.dask.{table}]"]
        lines += [
            *_comment(descriptions()[key]),
            f"#{setting.name} = {to_toml(setting.dump(setting.default))}",
        ]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of ami-builder.toml as users write it, for editors."""
    made = TypeAdapter(ConfigFile).json_schema()
    tables = {name: type(getattr(ImageSettings(), name)) for name in schema.TABLES}
    for key, setting in SETTINGS.items():
        cls = tables.get(setting.table, ImageSettings)
        field = made["$defs"][cls.__name__]["properties"][setting.name]
        field |= {"default": setting.dump(setting.default), "description": descriptions()[key]}
    for name in tables:  # the default of a table is an empty one
        del made["$defs"]["ImageSettings"]["properties"][name]["default"]
    for name, field in made["properties"].items():
        field["description"] = descriptions()[f"ConfigFile.{name}"]
        field.pop("default", None)
    made["properties"]["images"]["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_text() -> str:
    """Return the JSON schema as it is committed in docs/ami-builder.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


@cache
def descriptions() -> Mapping[str, str]:
    """Return what each setting is about, by its key; of the file's own keys by `ConfigFile.images`."""
    classes = {type(getattr(ImageSettings(), table)).__name__: f"{table}." for table in schema.TABLES}
    classes |= {"ImageSettings": "", "ConfigFile": "ConfigFile."}
    found = {}
    for cls in ast.parse(inspect.getsource(schema)).body:
        if isinstance(cls, ast.ClassDef) and cls.name in classes:
            for field, docstring in pairwise(cls.body):
                if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                    text = ast.literal_eval(docstring.value)
                    found[classes[cls.name] + ast.unparse(field.target)] = " ".join(text.split())
    return found


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


_HEAD = """\
# The VM images that `ami-builder build` makes. An empty table is a complete image: every setting has the
# default that is written here. To change a setting, remove the `#` before it and change the value.
#
#   [defaults.*]            settings of all images
#   [images.NAME.*]         settings of one image, over [defaults]
#   AMI_BUILDER_TABLE__KEY  over the file, for one run: AMI_BUILDER_MEMORY__RESERVE=5%
#   --set TABLE.KEY=VALUE   over all others: --set memory.reserve=5%
#
# A list replaces a list; outside this file commas separate its items. Sizes: "512MiB", "2GiB", or bytes.
# Durations: "300s", "10min", "1h", or seconds. Paths are relative to the folder of this file or, outside
# this file, to the current one. `ami-builder config show` prints each value and where it came from. No
# setting takes a secret.

# The image that commands use when none is named. Needed only with several images.
#default_image = "dask"

[images.dask]"""

"""ami-builder.toml, the environment and the flags -> model.Image, with every mistake named at once."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ami_builder.config import conflicts
from ami_builder.config.schema import (
    FIELDS,
    FileTable,
    Image,
    ImageTable,
    from_text,
    json_schema,
    schema_text,
)
from ami_builder.config.toml_lines import KeyPath, dotted, key_lines, line_of
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.system import resources

__all__ = ["Config", "Setting", "find", "json_schema", "load", "overrides_from", "schema_text"]

FILE_NAME = "ami-builder.toml"
ENVIRONMENT_FILE = "AMI_BUILDER_CONFIG"
ENVIRONMENT_PREFIX = "AMI_BUILDER_"
FLAG = "--set"
_TOP, _TABLES = tuple(FileTable.model_fields), tuple(ImageTable.model_fields)
_VARIABLES: Mapping[str, str] = {
    ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): key for key in FIELDS if "." in key
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of an image, as `config show` lists it."""

    key: str
    """Such as `memory.reserve`."""
    value: object
    """As one writes it in TOML: text, a whole number or a list of either."""
    origin: str
    """`default`, `ami-builder.toml:12`, `AMI_BUILDER_MEMORY__RESERVE` or `--set`."""

    @property
    def text(self) -> str:
        """The value as it stands in TOML."""
        return json.dumps(self.value, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The images that were asked for, all of whose settings are right."""

    path: Path
    names: tuple[str, ...]
    """Of every image in the file, whether or not it was asked for."""
    default_image: str | None
    images: Mapping[str, Image]
    settings: Mapping[str, tuple[Setting, ...]]

    def select(self, name: str | None = None) -> Image:
        """Return the named image, or the one that is meant when none is; raises UsageError with the names."""
        return self.images[_choose(self.names, self.default_image, name, self.path)]

    def origins(self, name: str) -> tuple[Setting, ...]:
        """Return every setting of an image, and where its value came from; raises UsageError."""
        return self.settings[_choose(self.names, self.default_image, name, self.path)]


class _Origin(NamedTuple):
    place: str
    key: str


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings of one level of precedence, and where each of them was written."""

    table: ImageTable
    where: Callable[..., _Origin]


Model = TypeVar("Model", bound=BaseModel)


def find(path: Path | None, environ: Mapping[str, str]) -> Path:
    """Return `path`, or $AMI_BUILDER_CONFIG, the nearest file from here upwards, or the shipped one."""
    if path is not None:
        return path
    if named := environ.get(ENVIRONMENT_FILE):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        try:
            if (folder / FILE_NAME).exists():
                return folder / FILE_NAME
        except OSError:  # a folder above that we may not look into
            continue
    return resources.default_config()


def load(
    path: Path | None,
    *,
    image: str | None = None,
    environ: Mapping[str, str],
    overrides: Mapping[str, str] | None = None,
) -> Config:
    """Read the configuration; raises UsageError that names every mistake with its place.

    With `image` only that one is made and its files are looked for; without, all of them. Environment and
    `overrides` (`memory.reserve` -> `5%`) apply to each that is made.
    """
    file = find(path, environ)
    raw, lines = _read(
        file, f"{ENVIRONMENT_FILE} names it; " if not path and environ.get(ENVIRONMENT_FILE) else ""
    )
    shown = _shown(file)
    wrong = _Mistakes()

    def in_file(*path: str | int) -> _Origin:
        return _Origin(f"{shown}:{line_of(lines, path)}", dotted(path))

    names = raw.get("images", {})
    if names == {}:
        wrong.add(in_file(), "there is no image: add a table [images.NAME], which may be empty")
    table = wrong.validated(FileTable, raw, file.absolute().parent, in_file)
    # What is no table of images has been noted as that.
    if isinstance(names, Mapping) and table.default_image and table.default_image not in names:
        near = did_you_mean(table.default_image, names)
        wrong.add(in_file("default_image"), f"expected the name of an image{near}", table.default_image)

    defaults = _Layer(table.defaults, partial(in_file, "defaults"))
    upper = [
        _text_layer(wrong, _from_environment(wrong, environ)),
        _text_layer(wrong, _from_flags(wrong, overrides or {})),
    ]
    merged, settings = {}, {}
    for name, own in table.images.items():
        if image not in (None, name):
            continue
        layers = [defaults, _Layer(own, partial(in_file, "images", name)), *upper]
        merged[name] = reduce(ImageTable.overlaid, (layer.table for layer in layers), ImageTable())
        wrong.check(merged[name], layers, in_file("images", name))
        settings[name] = tuple(
            Setting(key=key, value=value, origin=_origin(layers, key, _Origin("default", key)).place)
            for key, value in merged[name].shown().items()
        )
    wrong.stop()
    config = Config(
        path=file,
        names=tuple(table.images),
        default_image=table.default_image or None,
        images=MappingProxyType({name: one.image(name) for name, one in merged.items()}),
        settings=MappingProxyType(settings),
    )
    if image is not None:
        config.select(image)
    return config


def overrides_from(items: Iterable[str]) -> dict[str, str]:
    """Return the `overrides` of load from `--set key=value` items, the last of a key; raises UsageError."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                f"{FLAG} {item}: expected KEY=VALUE", hint=f"for example {FLAG} memory.reserve=5%"
            )
        pairs[key.strip()] = value
    return pairs


def _read(file: Path, why: str) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    shown = _shown(file)
    hint = f"{why}a complete and commented file is {_shown(resources.default_config())}"
    try:
        text = file.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text), key_lines(text)
    except OSError as wrong:
        raise UsageError(f"{shown} can't be read: {wrong.strerror}", hint=hint) from wrong
    except UnicodeDecodeError as wrong:
        line = wrong.object[: wrong.start].count(b"\n") + 1
        raise UsageError(f"{shown}:{line}: not UTF-8 text: {wrong.reason}", hint=hint) from wrong
    except RecursionError as wrong:
        raise UsageError(f"{shown}: not valid TOML: nested too deeply", hint=hint) from wrong
    except ValueError as wrong:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(wrong), re.DOTALL)
        place, what = (f":{found[2]}:{found[3]}", found[1]) if found else ("", str(wrong))
        raise UsageError(f"{shown}{place}: not valid TOML: {what}", hint=hint) from wrong


class _Mistakes:
    """Everything that is wrong, so that one error names it all."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._keys: set[str] = set()  # whatever depends on these is not complained about

    def add(self, origin: _Origin, message: str, *value: object) -> None:
        """Note a mistake, with the value if there is one to show."""
        setting = " = ".join([origin.key, *map(_brief, value)])
        self._lines.append(": ".join(part for part in (origin.place, setting, message) if part))

    def validated(
        self, model: type[Model], raw: dict[str, Any], folder: Path, where: Callable[..., _Origin]
    ) -> Model:
        """Return what is right in `raw`; what is wrong is noted, and taken out of it."""
        while True:
            try:
                return model.model_validate(raw, context=folder)
            except ValidationError as wrong:
                for details in wrong.errors(include_url=False):
                    unknown = details["type"] == "extra_forbidden"
                    # A table's own name is wrong where pydantic says so of its "[key]".
                    named = details["loc"][-1] == "[key]" and not unknown
                    path = details["loc"][:-1] if named else details["loc"]
                    message = _message(path, details)
                    self.add(where(*path), message, *([] if unknown else [details["input"]]))
                    self._keys.add(dotted(_inside(path)[:2]))
                    _take_out(raw, path)

    def check(self, merged: ImageTable, layers: Sequence[_Layer], image: _Origin) -> None:
        """Note what is wrong with the settings of an image together."""
        for keys, message in conflicts.find(merged):
            if self._keys.isdisjoint({*keys, *(key.partition(".")[0] for key in keys)}):
                # A default is nobody's mistake: point at what it does not go with.
                places = (_origin(layers, key, image).place for key in keys)
                place = next((place for place in places if place != image.place), image.place)
                key = _origin(layers, keys[0], _Origin("", f"{image.key}.{keys[0]}")).key
                self.add(_Origin(place, key), message, merged.shown()[keys[0]])

    def stop(self) -> None:
        """Raise UsageError when anything was noted."""
        if lines := list(dict.fromkeys(self._lines)):
            count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
            raise UsageError(
                "\n  ".join([f"the configuration has {count}:", *lines]),
                hint=f"every setting is explained in {_shown(resources.default_config())}",
            )


def _message(path: KeyPath, details: ErrorDetails) -> str:
    match details["type"]:
        case "value_error":
            return str(details["ctx"]["error"])
        case "extra_forbidden":
            return "unknown key" + _suggestion(path)
        case "model_type" | "dict_type":
            return "expected a table"
        case "tuple_type":
            return 'expected a list such as ["…", "…"]'
        case _:
            return details["msg"]


def _suggestion(path: KeyPath) -> str:
    """Return `; did you mean …?` with a sibling's name, or else with the same name in another table."""
    word, inside = str(path[-1]), _inside(path)
    if inside == path:  # at the top of the file
        return f"; did you mean defaults.{word}?" if word in _TABLES else did_you_mean(word, _TOP)
    table = f"{inside[0]}." if len(inside) > 1 else ""
    siblings = [key.removeprefix(table) for key in FIELDS if key.startswith(table)] if table else _TABLES
    elsewhere = [key for key in FIELDS if key.rpartition(".")[2] == word]
    return did_you_mean(word, siblings) or (f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else "")


def _from_environment(wrong: _Mistakes, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return key -> (variable, text); a variable that can only be a misspelt setting is a mistake."""
    single = {variable.replace("__", "_"): variable for variable in _VARIABLES}
    found = {}
    for variable, text in environ.items():
        if key := _VARIABLES.get(variable):
            found[key] = (variable, text)
        elif variable in single:
            wrong.add(_Origin(variable, ""), f"unknown setting; did you mean {single[variable]}?")
        elif variable.startswith(ENVIRONMENT_PREFIX) and "__" in variable:
            wrong.add(_Origin(variable, ""), f"unknown setting{did_you_mean(variable, _VARIABLES)}")
    return found


def _from_flags(wrong: _Mistakes, overrides: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    found = {}
    for key, text in overrides.items():
        if key in FIELDS:
            found[key] = (FLAG, text)
        else:
            wrong.add(_Origin(FLAG, key), f"unknown setting{did_you_mean(key, FIELDS)}")
    return found


def _text_layer(wrong: _Mistakes, found: Mapping[str, tuple[str, str]]) -> _Layer:
    raw: dict[str, Any] = {}
    for key, (_, text) in found.items():
        table, _, name = key.rpartition(".")
        (raw.setdefault(table, {}) if table else raw)[name] = from_text(key, text)

    def where(*path: str | int) -> _Origin:
        return _Origin(found[dotted(path[:2])][0], dotted(path))

    return _Layer(wrong.validated(ImageTable, raw, Path.cwd(), where), where)


def _origin(layers: Sequence[_Layer], key: str, default: _Origin) -> _Origin:
    """Return where the value of `key` comes from."""
    return next((one.where(*key.split(".")) for one in reversed(layers) if one.table.sets(key)), default)


def _inside(path: KeyPath) -> KeyPath:
    """Return a path within an image's settings, without what leads there in the file."""
    return path[{"images": 2, "defaults": 1}.get(str(path[0]), 0) :] or path


def _take_out(raw: Any, path: KeyPath) -> None:
    """Remove the innermost key of `path`, and with it a list that one item is wrong in."""
    depth = 1
    while depth < len(path) and isinstance(inner := raw.get(path[depth - 1]), dict):
        raw, depth = inner, depth + 1
    raw.pop(path[depth - 1], None)


def _brief(value: object) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # a number of more digits than Python writes
        return "…"
    return text if len(text) <= 60 else f"{text[:56]} …"


def _shown(path: Path) -> str:
    """Return a path as short as it can be said from here."""
    here, there = Path.cwd(), path.absolute()
    return str(there.relative_to(here) if there.is_relative_to(here) else there)


def _choose(names: Sequence[str], default: str | None, name: str | None, file: Path) -> str:
    chosen = name or default or (names[0] if len(names) == 1 else None)
    known = f"the images in {_shown(file)} are: {', '.join(names)}"
    if chosen is None:
        raise UsageError("no image was named, and there are several", hint=f"{known}; default_image sets one")
    if chosen not in names:
        raise UsageError(f"there is no image {chosen}{did_you_mean(chosen, names)}", hint=known)
    return chosen

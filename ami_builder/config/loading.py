"""ami-builder.toml, the environment and the flags -> Image, with every mistake reported at once.

pydantic-settings does not read the environment here: it takes lists as JSON, does not report which variable
is wrong or misspelt, and importing it takes longer than importing pydantic.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ami_builder.config import conflicts
from ami_builder.config.positions import KeyPath, dotted, key_lines, line_of
from ami_builder.config.schema import SETTINGS, ConfigFile, Image, ImageSettings
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.core.records import TargetKind
from ami_builder.system import resources

FILE_NAME = "ami-builder.toml"
ENVIRONMENT_FILE = "AMI_BUILDER_CONFIG"
ENVIRONMENT_PREFIX = "AMI_BUILDER_"
FLAG = "--set"
_TOP = tuple(field.name for field in fields(ConfigFile))
_TABLES = tuple(field.name for field in fields(ImageSettings))
_VARIABLES: Mapping[str, str] = {ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): key for key in SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingValue:
    """The value of one setting of an image, as `config show` lists it."""

    key: str
    """Such as `memory.reserve`."""
    value: object
    """As TOML has it."""
    origin: str
    """`default`, `ami-builder.toml:12`, `AMI_BUILDER_MEMORY__RESERVE` or `--set`."""

    @property
    def text(self) -> str:
        """The value as it is written in TOML."""
        return json.dumps(self.value, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The images of a file, with valid settings."""

    path: Path
    default_image: str | None
    images: Mapping[str, Image]
    settings: Mapping[str, tuple[SettingValue, ...]]
    """Of each image: every setting, and where its value came from."""

    def select(self, name: str | None = None) -> Image:
        """Return the named image, or without a name the default one; raises UsageError with the names."""
        default = self.default_image or (next(iter(self.images)) if len(self.images) == 1 else None)
        chosen = default if name is None else name
        known = f"the images in {_short(self.path)} are: {', '.join(self.images)}"
        if chosen is None:
            hint = f"name one (some commands have --image), or write default_image into it; {known}"
            raise UsageError("no image was named, and there are several", hint=hint)
        if chosen not in self.images:
            raise UsageError(f"there is no image {chosen}{did_you_mean(chosen, self.images)}", hint=known)
        return self.images[chosen]


class _Origin(NamedTuple):
    position: str
    """Such as `ami-builder.toml:12`."""
    key: str
    """The key as written there."""


_Layer: TypeAlias = Mapping[str, tuple[object, _Origin]]
"""The settings of one level of precedence: key -> value and origin."""
Model = TypeVar("Model", ConfigFile, ImageSettings)


def find(path: Path | None, environ: Mapping[str, str]) -> Path:
    """Return `path`, or $AMI_BUILDER_CONFIG, the nearest file from here upwards, or the shipped one."""
    if path is not None:
        return path
    if named := environ.get(ENVIRONMENT_FILE):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        # A link to nowhere counts too; a folder that we cannot look into does not.
        if os.path.lexists(folder / FILE_NAME):
            return folder / FILE_NAME
    return resources.default_config()


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, str] | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
    target: TargetKind = TargetKind.QEMU,
) -> Config:
    """Read the configuration; raises UsageError that reports every mistake with its position.

    Settings that depend on the target, such as `arch`, have their defaults for `target` in the images.

    Environment and `overrides` (`memory.reserve` -> `5%`) apply to each image. `flags` has the flags of
    overrides that did not come from --set (`verify.memory` -> `--memory`), for messages.
    """
    file = find(path, environ)
    raw, lines = _read(
        file, f"{ENVIRONMENT_FILE} names it; " if not path and environ.get(ENVIRONMENT_FILE) else ""
    )
    short = _short(file)
    mistakes = _Mistakes()

    def in_file(*path: str | int) -> _Origin:
        return _Origin(f"{short}:{line_of(lines, path)}", dotted(path))

    names = raw.get("images", {})
    if names == {}:
        mistakes.add(in_file(), "there is no image: add a table [images.NAME], which may be empty")
    content = mistakes.validated(_file_type(), raw, file.absolute().parent, in_file)
    # If `images` is not a table, that has been reported.
    if isinstance(names, Mapping) and content.default_image and content.default_image not in names:
        near = did_you_mean(content.default_image, names)
        mistakes.add(in_file("default_image"), f"expected the name of an image{near}", content.default_image)

    defaults = _layer(content.defaults, raw.get("defaults", {}), partial(in_file, "defaults"))
    variables = _text_layer(mistakes, _from_environment(mistakes, environ))
    overridden = _text_layer(mistakes, _from_flags(mistakes, overrides or {}, flags))
    images, values = {}, {}
    for name, own in content.images.items():
        layer = _layer(own, raw["images"][name], partial(in_file, "images", name))
        given = {**defaults, **layer, **variables, **overridden}
        images[name] = ImageSettings().overlaid({key: value for key, (value, _) in given.items()})
        mistakes.check(images[name], given, in_file("images", name))
        values[name] = tuple(
            SettingValue(
                key=key,
                value=setting.dump(images[name].get(key)),
                origin=given[key][1].position if key in given else "default",
            )
            for key, setting in SETTINGS.items()
        )
    mistakes.stop()
    return Config(
        path=file,
        default_image=content.default_image or None,
        images=MappingProxyType({name: settings.image(name, target) for name, settings in images.items()}),
        settings=MappingProxyType(values),
    )


def overrides_from(items: Iterable[str]) -> dict[str, str]:
    """Return the `overrides` of load from `--set key=value` items, the last of a key; raises UsageError."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"{FLAG} {item}: expected KEY=VALUE", hint=f"for example {FLAG} memory.reserve=5%"
            )
        pairs[key.strip()] = value
    return pairs


def _read(file: Path, why: str) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    short = _short(file)
    hint = f"{why}a complete and commented file is {_short(resources.default_config())}"
    try:
        if file.is_symlink() and not file.exists():
            link = f"it is a symbolic link to {file.readlink()}, which does not exist"
            raise UsageError(f"{short} can't be read: {link}", hint=hint)
        if file.name == FILE_NAME and file.is_fifo():
            # To read one waits for ever; with another name, such as /dev/fd/63, somebody writes to it.
            raise UsageError(f"{short} can't be read: it is a FIFO", hint=hint)
        text = file.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text), key_lines(text)
    except OSError as wrong:
        raise UsageError(f"{short} can't be read: {wrong.strerror}", hint=hint) from wrong
    except UnicodeDecodeError as wrong:
        line = wrong.object[: wrong.start].count(b"\n") + 1
        raise UsageError(f"{short}:{line}: not UTF-8 text: {wrong.reason}", hint=hint) from wrong
    except RecursionError as wrong:
        raise UsageError(f"{short}: not valid TOML: nested too deeply", hint=hint) from wrong
    except ValueError as wrong:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(wrong), re.DOTALL)
        position, what = (f":{found[2]}:{found[3]}", found[1]) if found else ("", str(wrong))
        raise UsageError(f"{short}{position}: not valid TOML: {what}", hint=hint) from wrong


@cache
def _file_type() -> TypeAdapter[ConfigFile]:
    return TypeAdapter(ConfigFile)


@cache
def _settings_type() -> TypeAdapter[ImageSettings]:
    return TypeAdapter(ImageSettings)


class _Mistakes:
    """Every mistake, so that one error reports them all."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._keys: set[str] = set()  # what depends on these is not reported

    def add(self, origin: _Origin, message: str, *value: object, default: bool = False) -> None:
        """Note a mistake, with the value if there is one to show."""
        setting = " = ".join([origin.key, *map(_brief, value)]) + " (the default)" * default
        self._lines.append(": ".join(part for part in (origin.position, setting, message) if part))

    def validated(
        self, adapter: TypeAdapter[Model], raw: dict[str, Any], folder: Path, where: Callable[..., _Origin]
    ) -> Model:
        """Return what is valid in `raw`; what is not is noted and removed from it."""
        while True:
            try:
                return adapter.validate_python(raw, context=folder)
            except ValidationError as wrong:
                for details in wrong.errors(include_url=False):
                    unknown = details["type"] == "unexpected_keyword_argument"
                    # pydantic reports a table's invalid name under "[key]".
                    named = details["loc"][-1] == "[key]" and not unknown
                    path = details["loc"][:-1] if named else details["loc"]
                    message = _message(path, details)
                    self.add(where(*path), message, *([] if unknown else [details["input"]]))
                    self._keys.add(dotted(_inside(path)[:2]))
                    _remove(raw, path)

    def check(self, settings: ImageSettings, given: _Layer, image: _Origin) -> None:
        """Note what is wrong with the settings of an image together."""
        for keys, message in conflicts.find(settings):
            if self._keys.isdisjoint({*keys, *(key.partition(".")[0] for key in keys)}):
                # A default is not a mistake: report the position of a setting that it conflicts with.
                position = next((given[key][1].position for key in keys if key in given), image.position)
                default = keys[0] not in given
                key = f"{image.key}.{keys[0]}" if default else given[keys[0]][1].key
                value = SETTINGS[keys[0]].dump(settings.get(keys[0]))
                self.add(_Origin(position, key), message, value, default=default)

    def stop(self) -> None:
        """Raise UsageError if anything was noted."""
        if lines := list(dict.fromkeys(self._lines)):
            count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
            raise UsageError(
                "\n  ".join([f"the configuration has {count}:", *lines]),
                hint=f"every setting is explained in {_short(resources.default_config())}",
            )


def _message(path: KeyPath, details: ErrorDetails) -> str:
    match details["type"]:
        case "value_error":
            return str(details["ctx"]["error"])
        case "enum":
            options = re.findall(r"'([^']*)'", details["ctx"]["expected"])
            word = details["input"]
            near = did_you_mean(word, options) if isinstance(word, str) else ""
            return f"expected one of {', '.join(options)}{near}"
        case "bool_type":
            return "expected true or false"
        case "unexpected_keyword_argument":
            return "unknown key" + _suggestion(path)
        case "dataclass_type" | "dict_type":
            return "expected a table"
        case "tuple_type":
            item = details["input"] if isinstance(details["input"], str) else "…"
            return f"expected a list such as {_brief([item])}"
        case _:
            return details["msg"]


def _suggestion(path: KeyPath) -> str:
    """Return `; did you mean …?` with a sibling's name, or else with the same name in another table."""
    word, inside = str(path[-1]), _inside(path)
    if inside == path:  # at the top of the file
        return f"; did you mean defaults.{word}?" if word in _TABLES else did_you_mean(word, _TOP)
    table = f"{inside[0]}." if len(inside) > 1 else ""
    siblings = [key.removeprefix(table) for key in SETTINGS if key.startswith(table)] if table else _TABLES
    elsewhere = [key for key in SETTINGS if key.rpartition(".")[2] == word]
    return did_you_mean(word, siblings) or (f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else "")


def _from_environment(mistakes: _Mistakes, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return key -> (variable, text); a variable that looks like a misspelt setting is a mistake."""
    single = {variable.replace("__", "_"): variable for variable in _VARIABLES}
    found = {}
    for variable, text in environ.items():
        if key := _VARIABLES.get(variable):
            found[key] = (variable, text)
        elif variable in single:
            mistakes.add(_Origin(variable, ""), f"unknown setting; did you mean {single[variable]}?")
        elif variable.startswith(ENVIRONMENT_PREFIX) and "__" in variable:
            mistakes.add(_Origin(variable, ""), f"unknown setting{did_you_mean(variable, _VARIABLES)}")
    return found


def _from_flags(
    mistakes: _Mistakes, overrides: Mapping[str, str], flags: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    found = {}
    for key, text in overrides.items():
        if key in SETTINGS:
            found[key] = (flags.get(key, FLAG), text)
        else:
            inside = [each for each in SETTINGS if each.startswith(f"{key}.")]
            unknown = f"unknown setting{did_you_mean(key, SETTINGS)}"
            table = f"a table, not a setting; expected one of {', '.join(inside)}"
            mistakes.add(_Origin(FLAG, key), table if inside else unknown)
    return found


def _layer(settings: ImageSettings, raw: Mapping[str, Any], where: Callable[..., _Origin]) -> _Layer:
    """Return the settings that `raw` has, with their values from `settings`."""
    return {
        key: (settings.get(key), where(*key.split(".")))
        for key, setting in SETTINGS.items()
        if setting.name in (raw.get(setting.table, {}) if setting.table else raw)
    }


def _text_layer(mistakes: _Mistakes, found: Mapping[str, tuple[str, str]]) -> _Layer:
    raw: dict[str, Any] = {}
    for key, (_, text) in found.items():
        setting = SETTINGS[key]
        table = raw.setdefault(setting.table, {}) if setting.table else raw
        table[setting.name] = setting.from_text(text)

    def where(*path: str | int) -> _Origin:
        return _Origin(found[dotted(path[:2])][0], dotted(path))

    return _layer(mistakes.validated(_settings_type(), raw, Path.cwd(), where), raw, where)


def _inside(path: KeyPath) -> KeyPath:
    """Return a path within an image's settings, without what leads there in the file."""
    return path[{"images": 2, "defaults": 1}.get(str(path[0]), 0) :] or path


def _remove(raw: Any, path: KeyPath) -> None:
    """Remove the innermost key of `path`; if one item of a list is wrong, the whole list."""
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


def _short(path: Path) -> str:
    """Return a path relative to the current folder, if it is in it."""
    here, there = Path.cwd(), path.absolute()
    return str(there.relative_to(here) if there.is_relative_to(here) else there)

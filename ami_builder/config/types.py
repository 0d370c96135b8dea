"""The kinds of values in ami-builder.toml: how each is read, shown, and described to editors."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import core_schema

from ami_builder.core.errors import did_you_mean
from ami_builder.core.units import (
    DURATION_PATTERN,
    GIB,
    MIB,
    PERCENT_PATTERN,
    SIZE_PATTERN,
    TIB,
    Reserve,
    format_duration,
    format_reserve,
    format_size,
    parse_duration,
    parse_reserve,
    parse_size,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A region that an AMI is copied to."""

    region: str
    kms_key: str = ""
    """Id, ARN or alias of that region's key for the copy; empty: as aws.encrypt says."""


DEBIAN = "debian"
DEFAULT_REFERENCE = "ami-builder/dask:2026.8.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How one kind of value is written: read from TOML, shown in its terms, described to editors."""

    parse: Callable[[object, Path], object]
    """(value, folder that paths are relative to) -> value; raises ValueError telling what was expected."""
    show: Callable[[Any], object]
    schema: Mapping[str, Any]
    whole: bool = False
    """Written as a whole number in TOML, so text from the environment is turned into one."""
    truth: bool = False
    """Written as true or false in TOML, so text from the environment is turned into one."""

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def validate(value: object, info: ValidationInfo) -> object:
            return self.parse(value, info.context or Path.cwd())

        return core_schema.with_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(self.show)
        )

    def __get_pydantic_json_schema__(self, schema: object, handler: object) -> dict[str, Any]:
        return dict(self.schema)


def text(pattern: str, expected: str, *, most: int = 255, examples: tuple[str, ...] = ()) -> Form:
    """Return the form of text that `pattern` matches whole, at most `most` characters."""

    def parse(value: object, folder: Path) -> str:
        if not isinstance(value, str) or len(value) > most or not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    schema: dict[str, Any] = {"type": "string", "pattern": f"^(?:{pattern})$", "maxLength": most}
    return Form(parse=parse, show=str, schema=schema | ({"examples": list(examples)} if examples else {}))


def choice(options: type[StrEnum]) -> Form:
    """Return the form of one of the values of an enumeration."""
    names = [str(option) for option in options]

    def parse(value: object, folder: Path) -> StrEnum:
        if value in names:
            return options(value)
        near = did_you_mean(value, names) if isinstance(value, str) else ""
        raise ValueError(f"expected one of {', '.join(names)}{near}")

    return Form(parse=parse, show=str, schema={"type": "string", "enum": names})


def count(least: int, most: int, *, auto: bool = False) -> Form:
    """Return the form of a whole number between two bounds, or also `auto`, which is None."""

    def parse(value: object, folder: Path) -> int | None:
        if auto and value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}" + (" or auto" if auto else ""))
        return value

    number = {"type": "integer", "minimum": least, "maximum": most}
    return Form(
        parse=parse,
        show=lambda value: "auto" if value is None else value,
        schema={"anyOf": [number, {"const": "auto"}]} if auto else number,
        whole=True,
    )


def _truth(value: object, folder: Path) -> bool:
    if value is True or value is False:
        return value
    raise ValueError("expected true or false")


def size(least: int, most: int, *, examples: tuple[str, ...]) -> Form:
    """Return the form of a size between two bounds, in bytes but whole MiB, as QEMU and Packer take it."""

    def parse(value: object, folder: Path) -> int:
        found = parse_size(value)
        if not least <= found <= most or found % MIB:
            raise ValueError(f"expected whole MiB from {format_size(least)} to {format_size(most)}")
        return found

    written = {"type": "string", "pattern": SIZE_PATTERN}
    number = {"type": "integer", "minimum": least, "maximum": most, "multipleOf": MIB}
    return Form(
        parse=parse, show=format_size, schema={"anyOf": [written, number], "examples": list(examples)}
    )


def _path(value: object, folder: Path) -> Path:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("expected the path of a file")
    try:
        return folder / Path(value).expanduser()
    except RuntimeError as wrong:
        raise ValueError("expected the path of a file; the home folder in it is unknown") from wrong


def _source(value: object, folder: Path) -> str:
    expected = f"expected {DEBIAN}, or the path or http(s) URL of a qcow2 or raw cloud image"
    if not isinstance(value, str) or not value:
        raise ValueError(expected)
    if value == DEBIAN:
        return value
    if "://" not in value:
        return str(_path(value, folder))
    return _check_url(value, expected)


def _mirror(value: object, folder: Path) -> str:
    expected = "expected the http(s) URL of a Debian mirror, or nothing for Debian's own"
    if value == "":
        return ""
    return _check_url(value, expected)


def _check_url(value: object, expected: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value) or re.search(r"[\"'`\\<>]", value):
        raise ValueError(expected)
    try:
        url = urlsplit(value)
        fine = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError as wrong:
        raise ValueError(expected) from wrong
    if "@" in url.netloc:
        raise ValueError(f"{expected}, without a name or password: settings end up in records and logs")
    if not fine:
        raise ValueError(expected)
    return value


def _checksum(value: object, folder: Path) -> str:
    if isinstance(value, str) and re.fullmatch(_CHECKSUM, value):
        return value.lower()
    expected = "expected sha256: with 64 hexadecimal digits or sha512: with 128"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]+", value) and len(value) in (64, 128):
        raise ValueError(f"{expected}; did you mean sha{len(value) * 4}:{value[:8]}…?")
    raise ValueError(expected)


_WIDEST = {4: 8, 6: 16}


def _cidr(value: object, folder: Path) -> str:
    expected = "expected addresses such as 203.0.113.7/32 or 2001:db8::/64"
    try:
        network = ipaddress.ip_network(value) if isinstance(value, str) else None
    except ValueError as wrong:
        raise ValueError(f"{expected}: {wrong}") from wrong
    if network is None:
        raise ValueError(expected)
    if network.prefixlen < _WIDEST[network.version]:
        raise ValueError(
            f"{expected}, no wider than /{_WIDEST[network.version]}: ssh is not opened to everybody"
        )
    return str(network)


def _bridges(value: object, folder: Path) -> str:
    expected = "expected an IPv4 network such as 10.200.0.0/16, from /8 to /24"
    try:
        network = ipaddress.IPv4Network(value) if isinstance(value, str) else None
    except ValueError as wrong:
        raise ValueError(f"{expected}: {wrong}") from wrong
    if network is None or not 8 <= network.prefixlen <= 24:
        raise ValueError(expected)
    return str(network)


def parse_destination(value: object) -> Destination:
    """Return the region, and the key, of `eu-west-1` or `eu-west-1=alias/ours`; raises ValueError."""
    region, equals, key = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not re.fullmatch(_REGION, region) or not re.fullmatch(_KMS_KEYS, key) or bool(equals) != bool(key):
        raise ValueError("expected a region, or region=KEY with the id, alias/… or ARN of a KMS key there")
    return Destination(region=region, kms_key=key)


def _show_destination(value: Destination) -> str:
    return f"{value.region}={value.kms_key}" if value.kms_key else value.region


Item = TypeVar("Item")


def distinct(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Return items of which none is there twice; raises ValueError."""
    if len(set(items)) != len(items):
        raise ValueError("expected each item once")
    return items


def some(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Return items that are not none; raises ValueError."""
    if not items:
        raise ValueError("expected at least one item")
    return items


_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?"
_PORT = r":[0-9]{1,5}"
# A first part without a dot or a port is not a registry to Docker, unless it is localhost.
_REGISTRY = rf"(?:{_HOST}{_PORT}|localhost|[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+)"
_REFERENCE = (
    rf"(?:{_REGISTRY}/)?{_PART}(?:/{_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(?:@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})"
)
_CHECKSUM = r"(?:sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128})?"
_UNIT = (
    r"(?!dask(?:-health|-memory)?\.)[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]+)?"
    r"\.(?:service|socket|target|mount|path|timer)"
)
_ARN = r"arn:aws[a-z-]*"
_AMI_NAME = r"[A-Za-z0-9()\[\] ./'@_*?-]{1,128}"
_KMS_KEYS = (
    rf"(?:{_ARN}:kms:[a-z0-9-]+:[0-9]{{12}}:(?:key/[A-Za-z0-9-]+|alias/[A-Za-z0-9:/_-]+)"
    r"|[A-Za-z0-9-]+|alias/[A-Za-z0-9:/_-]+)?"
)
_REGION = r"[a-z]{2,}(?:-[a-z]+)+-[0-9]"
_ORGANIZATION = rf"{_ARN}:organizations::[0-9]{{12}}"

Name = Annotated[str, text(r"[a-z0-9][a-z0-9-]*", "a name of a-z, 0-9 and -, at most 63 characters", most=63)]
Channel = Annotated[str, text(r"(?:[a-z0-9][a-z0-9-]*)?", "one of lifecycle.channels, or nothing", most=63)]
Line = Annotated[str, text(r"[^\x00-\x1f\x7f]*", "one line of at most 200 characters", most=200)]
Package = Annotated[str, text(r"[a-z0-9][a-z0-9+.-]+", "the name of a Debian package", examples=("htop",))]
Pattern = Annotated[
    str,
    text(
        r"[a-zA-Z0-9*?\[\]][a-zA-Z0-9+._*?\[\]-]*",
        "the name of a package, or a pattern with * and ?",
        examples=("linux-image-*",),
    ),
]
Unit = Annotated[
    str,
    text(
        _UNIT, "a systemd unit with its ending, not Dask's own", examples=("amazon-cloudwatch-agent.service",)
    ),
]
Suite = Annotated[str, text(r"[a-z][a-z0-9.-]*", "the name of a Debian suite", examples=("trixie",))]
User = Annotated[str, text(r"[a-z_][a-z0-9_-]*", "the name of a Linux user", most=32, examples=("ubuntu",))]
Reference = Annotated[
    str,
    text(
        _REFERENCE, "[host[:port]/]name:tag or …@sha256:digest, in lower case", examples=(DEFAULT_REFERENCE,)
    ),
]
ContainerName = Annotated[
    str,
    text(
        r"[a-zA-Z0-9*?][a-zA-Z0-9_.*?-]*",
        "the name of a container, or a pattern with * and ?",
        examples=("datadog-agent",),
    ),
]
HostPort = Annotated[
    str,
    text(rf"(?:{_HOST}{_PORT})?", "host:port, or nothing", examples=("registry.internal:5000",)),
]
Checksum = Annotated[
    str, Form(parse=_checksum, show=str, schema={"type": "string", "pattern": f"^{_CHECKSUM}$"})
]
Source = Annotated[
    str,
    Form(
        parse=_source,
        show=str,
        schema={"type": "string", "minLength": 1, "examples": [DEBIAN, "images/cloud.qcow2"]},
    ),
]
Mirror = Annotated[str, Form(parse=_mirror, show=str, schema={"type": "string"})]
File = Annotated[Path, Form(parse=_path, show=str, schema={"type": "string", "minLength": 1})]
Reserved = Annotated[
    Reserve,
    Form(
        parse=lambda value, folder: parse_reserve(value),
        show=format_reserve,
        schema={
            "anyOf": [
                {"type": "string", "pattern": f"{SIZE_PATTERN}|{PERCENT_PATTERN}"},
                {"type": "integer", "minimum": 0},
            ],
            "examples": ["0", "256MiB", "5%"],
        },
    ),
]
Memory = Annotated[int, size(512 * MIB, 24 * TIB, examples=("2GiB", "512MiB"))]
Space = Annotated[int, size(0, 64 * TIB, examples=("0", "100GiB"))]
Disk = Annotated[int, size(2 * GIB, 64 * TIB, examples=("8GiB",))]
Duration = Annotated[
    float,
    Form(
        parse=lambda value, folder: parse_duration(value),
        show=format_duration,
        schema={
            "anyOf": [
                {"type": "string", "pattern": DURATION_PATTERN},
                {"type": "number", "exclusiveMinimum": 0},
            ],
            "examples": ["10min", "300s"],
        },
    ),
]
Truth = Annotated[bool, Form(parse=_truth, show=bool, schema={"type": "boolean"}, truth=True)]
Region = Annotated[str, text(rf"(?:{_REGION})?", "an AWS region, or nothing", examples=("eu-central-1",))]
SourceAmi = Annotated[
    str,
    text(
        rf"ami-[0-9a-f]{{8,17}}|ssm:/[A-Za-z0-9._/-]+|(?:[0-9]{{12}}|self|amazon|aws-marketplace)/{_AMI_NAME}",
        "owner/name pattern, ssm:/parameter or ami-…",
        examples=("136693071363/debian-13-amd64-*", "ssm:/aws/service/debian/release/13/latest/amd64"),
    ),
]
InstanceType = Annotated[
    str, text(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", "an EC2 instance type", most=40, examples=("m6i.large",))
]
Subnet = Annotated[str, text(r"subnet-[0-9a-f]{8,17}", "the id of a subnet, subnet-…")]
InstanceProfile = Annotated[
    str,
    text(
        rf"(?:{_ARN}:iam::[0-9]{{12}}:instance-profile/)?[A-Za-z0-9+=,.@_/-]{{1,128}}|",
        "the name or ARN of an instance profile, or nothing",
    ),
]
KmsKey = Annotated[str, text(_KMS_KEYS, "the id, alias/… or ARN of a KMS key, or nothing")]
CopyTo = Annotated[
    Destination,
    Form(
        parse=lambda value, folder: parse_destination(value),
        show=_show_destination,
        schema={
            "type": "string",
            "pattern": f"^{_REGION}(?:=.+)?$",
            "examples": ["eu-west-1", "eu-west-1=alias/ours"],
        },
    ),
]
Sharer = Annotated[
    str,
    text(
        rf"[0-9]{{12}}|{_ORGANIZATION}:organization/o-[a-z0-9]{{10,32}}"
        rf"|{_ORGANIZATION}:ou/o-[a-z0-9]{{10,32}}/ou-[a-z0-9]{{4,32}}-[a-z0-9]{{8,32}}",
        "the 12 digits of an account, or the ARN of an organization or an organizational unit",
        examples=("123456789012", "arn:aws:organizations::123456789012:organization/o-0123456789"),
    ),
]
Bridges = Annotated[
    str, Form(parse=_bridges, show=str, schema={"type": "string", "examples": ["10.200.0.0/16"]})
]
Cidr = Annotated[str, Form(parse=_cidr, show=str, schema={"type": "string", "examples": ["203.0.113.7/32"]})]

"""The types of settings: how each is read from TOML, written back, and described to editors and in the docs.

Each type has one phrase that says what is expected. pydantic's own errors ("String should match pattern …")
do not say what to write, and pydantic.ByteSize reads `2GB`, which means 10^9 bytes to Dask and 2^30
to Docker.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from ami_builder.core.options import Arch
from ami_builder.core.regions import REGION
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

DEBIAN = "debian"
DEFAULT_REFERENCE = "ami-builder/dask:2026.8.0"


_STRING = {"type": "string"}


@dataclass(frozen=True, slots=True)
class ValueType:
    """One type of value in ami-builder.toml."""

    expected: str
    """What to write, such as `a duration`, for errors and the documentation."""
    parse: Callable[[object, Path], object]
    """(value, folder that paths are relative to) -> value; raises ValueError with what is expected."""
    example: object
    """As TOML has it."""
    schema: Mapping[str, Any] = field(default_factory=lambda: _STRING)
    """The JSON schema."""
    dump: Callable[[Any], object] = str
    """value -> as TOML has it."""
    from_text: Callable[[str], object] = str
    """Text of an environment variable or a flag -> as TOML has it."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: object, info: ValidationInfo) -> object:
            return self.parse(value, info.context or Path.cwd())

        return core_schema.with_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**self.schema, "examples": [self.example]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Marks a list whose items are distinct, and at least `least` in number."""

    least: int = 0

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(items: tuple[object, ...]) -> tuple[object, ...]:
            if len(set(items)) != len(items):
                raise ValueError("expected each item once")
            if len(items) < self.least:
                raise ValueError("expected at least one item")
            return items

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        least = {"minItems": self.least} if self.least else {}
        return {**handler(schema), "uniqueItems": True, **least}


Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], Items()]
"""A list of distinct items."""
Some = Annotated[tuple[Item, ...], Items(least=1)]
"""A list of distinct items, at least one."""


def text(pattern: str, expected: str, example: str, *, most: int = 255) -> ValueType:
    """Return the type of text that `pattern` matches whole, of at most `most` characters."""

    def parse(value: object, folder: Path) -> str:
        if not isinstance(value, str) or len(value) > most or not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    return ValueType(expected, parse, example, {**_STRING, "pattern": f"^(?:{pattern})$", "maxLength": most})


def optional(inner: ValueType, word: str = "") -> ValueType:
    """Return `inner`, or None that is written as `word`."""

    def named(expected: str) -> str:
        return expected if word in expected else f"{expected}, or {word}"

    def parse(value: object, folder: Path) -> object:
        try:
            return None if value == word else inner.parse(value, folder)
        except ValueError as wrong:
            raise ValueError(named(str(wrong))) from wrong

    schema: Mapping[str, Any] = inner.schema
    if options := inner.schema.get("anyOf") or ([dict(inner.schema)] if len(inner.schema) > 1 else []):
        schema = {"anyOf": [*options, {"const": word}]}
    return replace(
        inner,
        expected=named(inner.expected),
        schema=schema,
        parse=parse,
        dump=lambda value: word if value is None else inner.dump(value),
    )


def count(least: int, most: int, *, example: int = 4, word: str = "") -> ValueType:
    """Return the type of a whole number between two bounds; with `word` also that, which is None."""
    expected = f"a whole number from {least} to {most}"

    def parse(value: object, folder: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected {expected}")
        return value

    def from_text(text: str) -> int | str:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else text

    schema = {"type": "integer", "minimum": least, "maximum": most}
    number = ValueType(expected, parse, example, schema, dump=int, from_text=from_text)
    return optional(number, word) if word else number


def size(least: int, most: int, example: str) -> ValueType:
    """Return the type of a size between two bounds, in bytes but whole MiB, as QEMU and Packer take it."""
    bounds = f"from {format_size(least)} to {format_size(most)}"

    def parse(value: object, folder: Path) -> int:
        found = parse_size(value)
        if not least <= found <= most or found % MIB:
            raise ValueError(f"expected whole MiB {bounds}")
        return found

    number = {"type": "integer", "minimum": least, "maximum": most, "multipleOf": MIB}
    schema = {"anyOf": [{**_STRING, "pattern": SIZE_PATTERN}, number]}
    return ValueType(f"a size {bounds}", parse, example, schema, dump=format_size)


def _path(value: object, folder: Path) -> Path:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("expected the path of a file")
    try:
        return folder / Path(value).expanduser()
    except RuntimeError as wrong:
        raise ValueError("expected the path of a file; the home folder in it is unknown") from wrong


def _arch(value: object, folder: Path) -> Arch | None:
    if value == "":
        return None
    if not isinstance(value, str) or (found := Arch.named(value)) is None:
        raise ValueError(f"expected {' or '.join(Arch)}, or nothing for the default")
    return found


def _source(value: object, folder: Path) -> str:
    expected = f"expected {DEBIAN}, or the path or http(s) URL of a qcow2 or raw cloud image"
    if not isinstance(value, str) or not value:
        raise ValueError(expected)
    return _check_url(value, expected) if "://" in value else str(_path(value, folder))


def _mirror(value: object, folder: Path) -> str:
    expected = "expected the http(s) URL of a Debian mirror, or nothing for Debian's own"
    return "" if value == "" else _check_url(value, expected)


def _check_url(value: object, expected: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value) or re.search(r"[\"'`\\<>]", value):
        raise ValueError(expected)
    try:
        url = urlsplit(value)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError as wrong:
        raise ValueError(expected) from wrong
    if "@" in url.netloc:
        raise ValueError(f"{expected}, without a name or password: settings end up in records and logs")
    if not valid:
        raise ValueError(expected)
    return value


def _checksum(value: object, folder: Path) -> str:
    if isinstance(value, str) and re.fullmatch(_CHECKSUM, value):
        return value.lower()
    expected = "expected sha256: with 64 hexadecimal digits or sha512: with 128"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]+", value) and len(value) in (64, 128):
        raise ValueError(f"{expected}; did you mean sha{len(value) * 4}:{value[:8]}…?")
    raise ValueError(expected)


def _cidr(value: object, folder: Path) -> str:
    network = _network(value, ipaddress.ip_network, "addresses such as 203.0.113.7/32 or 2001:db8::/64")
    widest = {4: 8, 6: 16}[network.version]
    if network.prefixlen < widest:
        raise ValueError(f"expected addresses no wider than /{widest}: ssh is not opened to everybody")
    return str(network)


def _bridges(value: object, folder: Path) -> str:
    expected = "an IPv4 network such as 10.200.0.0/16, from /8 to /24"
    network = _network(value, ipaddress.IPv4Network, expected)
    if not 8 <= network.prefixlen <= 24:
        raise ValueError(f"expected {expected}")
    return str(network)


Parsed = TypeVar("Parsed", ipaddress.IPv4Network, ipaddress.IPv4Network | ipaddress.IPv6Network)


def _network(value: object, parse: Callable[[str], Parsed], expected: str) -> Parsed:
    try:
        return parse(value if isinstance(value, str) else repr(value))
    except ValueError as wrong:
        raise ValueError(f"expected {expected}: {wrong}") from wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A region that an AMI is copied to."""

    region: str
    kms_key: str = ""
    """Id, ARN or alias of that region's key for the copy; empty: as aws.encrypt says."""


def parse_destination(value: object) -> Destination:
    """Return the region, and the key, of `eu-west-1` or `eu-west-1=alias/ours`; raises ValueError."""
    region, equals, key = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not re.fullmatch(REGION, region) or not re.fullmatch(KMS_KEY, key) or bool(equals) != bool(key):
        raise ValueError("expected a region, or region=KEY with the id, alias/… or ARN of a KMS key there")
    return Destination(region=region, kms_key=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A tag that the user puts on everything in the account."""

    key: str
    value: str


def _tag(value: object, folder: Path) -> Tag:
    key, equals, content = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not equals or not 1 <= len(key) <= 128 or len(content) > 256 or not (key + content).isprintable():
        raise ValueError("expected KEY=VALUE, with at most 128 and 256 characters")
    if key == "Name" or key.lower().startswith(("aws:", "ami-builder:")):
        raise ValueError("expected a key other than Name, aws:… and ami-builder:…, which are set already")
    return Tag(key=key, value=content)


_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?"
_PORT = r":[0-9]{1,5}"
# A first part without a dot or a port is not a registry to Docker, unless it is localhost.
_REGISTRY = rf"(?:{_HOST}{_PORT}|localhost|[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+)"
_REFERENCE = (
    rf"(?:{_REGISTRY}/)?{_PART}(?:/{_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(?:@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})"
)
_CHECKSUM = r"(?:sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128})"
_UNIT = (
    r"(?!dask(?:-health|-memory)?\.)[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]+)?"
    r"\.(?:service|socket|target|mount|path|timer)"
)
_ARN = r"arn:aws[a-z-]*"
_AMI_NAME = r"[A-Za-z0-9()\[\] ./'@_*?#-]{1,128}"
KMS_KEY = (
    rf"(?:{_ARN}:kms:[a-z0-9-]+:[0-9]{{12}}:(?:key/[A-Za-z0-9-]+|alias/[A-Za-z0-9:/_-]+)"
    r"|[A-Za-z0-9-]+|alias/[A-Za-z0-9:/_-]+)?"
)
_ORGANIZATION = rf"{_ARN}:organizations::[0-9]{{12}}"
_AMI = rf"ami-[0-9a-f]{{8,17}}|ssm:/[A-Za-z0-9._/-]+|(?:[0-9]{{12}}|self|amazon|aws-marketplace)/{_AMI_NAME}"
_SHARER = (
    rf"[0-9]{{12}}|{_ORGANIZATION}:organization/o-[a-z0-9]{{10,32}}"
    rf"|{_ORGANIZATION}:ou/o-[a-z0-9]{{10,32}}/ou-[a-z0-9]{{4,32}}-[a-z0-9]{{8,32}}"
)
_NAME = r"[a-z0-9][a-z0-9-]*"

Name = Annotated[str, text(_NAME, "a name of a-z, 0-9 and -, at most 63 characters", "dask", most=63)]
Line = Annotated[str, text(r"[^\x00-\x1f\x7f]*", "one line of at most 200 characters", "for tests", most=200)]
File = Annotated[Path, ValueType("the path of a file", _path, "test_ours.py", {**_STRING, "minLength": 1})]
Cpus = Annotated[int, count(1, 255)]
Memory = Annotated[int, size(512 * MIB, 24 * TIB, "4GiB")]
Space = Annotated[int, size(0, 64 * TIB, "64MiB")]
Headroom = Annotated[int | None, optional(size(0, 64 * TIB, "64MiB"), "auto")]
Disk = Annotated[int, size(2 * GIB, 64 * TIB, "20GiB")]
_SIZE_OR_PERCENT = {**_STRING, "pattern": f"{SIZE_PATTERN}|{PERCENT_PATTERN}"}
Reserved = Annotated[
    Reserve,
    ValueType(
        "a size, a percentage of what is available, or auto",
        lambda value, folder: parse_reserve(value),
        "5%",
        {"anyOf": [_SIZE_OR_PERCENT, {"type": "integer", "minimum": 0}, {"const": "auto"}]},
        format_reserve,
    ),
]
_SECONDS = {"type": "number", "exclusiveMinimum": 0}
Duration = Annotated[
    float,
    ValueType(
        "a duration",
        lambda value, folder: parse_duration(value),
        "45min",
        {"anyOf": [{**_STRING, "pattern": DURATION_PATTERN}, _SECONDS]},
        format_duration,
    ),
]

_IMAGE = f"{DEBIAN}, or the path or http(s) URL of a qcow2 or raw cloud image"
Source = Annotated[
    str | None,
    optional(ValueType(_IMAGE, _source, "images/cloud.qcow2", {**_STRING, "minLength": 1}), DEBIAN),
]
_SUM = ValueType(
    "sha256: or sha512: and the digest",
    _checksum,
    "sha256:" + "0123456789abcdef" * 4,
    {**_STRING, "pattern": f"^{_CHECKSUM}$"},
)
Checksum = Annotated[str | None, optional(_SUM)]
Mirror = Annotated[
    str, ValueType("the URL of a Debian mirror, or nothing", _mirror, "https://mirror.example.org/debian")
]
User = Annotated[str, text(r"[a-z_][a-z0-9_-]*", "the name of a Linux user", "ubuntu", most=32)]
Suite = Annotated[str, text(r"[a-z][a-z0-9.-]*", "the name of a Debian suite", "forky")]
Package = Annotated[str, text(r"[a-z0-9][a-z0-9+.-]+", "the name of a Debian package", "htop")]
_PATTERN = r"[a-zA-Z0-9*?\[\]][a-zA-Z0-9+._*?\[\]-]*"
PackagePattern = Annotated[
    str, text(_PATTERN, "the name of a package, or a pattern with * and ?", "linux-image-*")
]
SystemdUnit = Annotated[
    str, text(_UNIT, "a systemd unit with its ending, not Dask's own", "amazon-cloudwatch-agent.service")
]
Channel = Annotated[str, text(rf"(?:{_NAME})?", "one of lifecycle.channels, or nothing", "stable", most=63)]

_REFERENCE_FORM = "[host[:port]/]name:tag or …@sha256:digest, in lower case"
Reference = Annotated[str, text(_REFERENCE, _REFERENCE_FORM, "registry.example.org/dask:2026.8.0")]
Requirements = Annotated[
    Path | None, optional(ValueType("the path of a file, or nothing", _path, "requirements.txt"))
]
Bridges = Annotated[str, ValueType("an IPv4 network", _bridges, "10.200.0.0/16")]
_CONTAINER = r"[a-zA-Z0-9*?][a-zA-Z0-9_.*?-]*"
ContainerName = Annotated[
    str, text(_CONTAINER, "the name of a container, or a pattern with * and ?", "datadog-*")
]
HostPort = Annotated[
    str | None, optional(text(f"{_HOST}{_PORT}", "host:port, or nothing", "registry.internal:5000"))
]

Architecture = Annotated[
    Arch | None,
    ValueType(
        "amd64, arm64, or nothing",
        _arch,
        "arm64",
        {"enum": ["", *Arch, "x86_64", "aarch64"]},
        lambda value: "" if value is None else str(value),
    ),
]
Region = Annotated[str, text(rf"(?:{REGION})?", "an AWS region, or nothing", "eu-central-1")]
_PARAMETER = "ssm:/aws/service/debian/release/13/latest/amd64"
SourceAmi = Annotated[
    str, text(rf"(?:{_AMI})?", "owner/name pattern, ssm:/parameter or ami-…, or nothing", _PARAMETER)
]
_TYPE = r"[a-z][a-z0-9-]*\.[a-z0-9-]+"
InstanceType = Annotated[str, text(_TYPE, "an EC2 instance type", "m6i.xlarge", most=40)]
_SUBNET = r"subnet-[0-9a-f]{8,17}"
Subnet = Annotated[
    str,
    text(
        rf"(?:{REGION}=)?{_SUBNET}",
        "the id of a subnet, subnet-… or REGION=subnet-…",
        "subnet-0123456789abcdef0",
    ),
]
_PROFILE = rf"(?:{_ARN}:iam::[0-9]{{12}}:instance-profile/)?[A-Za-z0-9+=,.@_/-]{{1,128}}|"
InstanceProfile = Annotated[
    str, text(_PROFILE, "the name or ARN of an instance profile, or nothing", "ami-builder")
]
Cidr = Annotated[str, ValueType("an IP network", _cidr, "203.0.113.7/32")]
KmsKey = Annotated[str, text(KMS_KEY, "the id, alias/… or ARN of a KMS key, or nothing", "alias/ours")]
RootDevice = Annotated[
    str, text(r"(?:/dev/(?:sda1|xvda))?", "/dev/sda1, /dev/xvda, or nothing", "/dev/xvda", most=40)
]
CopyTo = Annotated[
    Destination,
    ValueType(
        "a region, or region=KEY",
        lambda value, folder: parse_destination(value),
        "us-west-2=alias/ours",
        {**_STRING, "pattern": f"^{REGION}(?:=.+)?$"},
        lambda value: f"{value.region}={value.kms_key}" if value.kms_key else value.region,
    ),
]
OwnTag = Annotated[
    Tag,
    ValueType(
        "a tag, as KEY=VALUE",
        _tag,
        "Owner=data-platform",
        {**_STRING, "pattern": "^[^=]{1,128}=.{0,256}$"},
        lambda tag: f"{tag.key}={tag.value}",
    ),
]
_ACCOUNT = "the 12 digits of an account, or the ARN of an organization or an organizational unit"
Sharer = Annotated[str, text(_SHARER, _ACCOUNT, "123456789012")]

"""ami-builder.toml: precedence, origins, and every mistake named at once, with its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomlkit
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from ami_builder.config import loading, reference
from ami_builder.config.loading import Config, SettingValue
from ami_builder.config.positions import key_lines
from ami_builder.config.schema import (
    SETTINGS,
    AwsSettings,
    BakeSettings,
    BaseSettings,
    ContainerSettings,
    DaskSettings,
    Image,
    ImageSettings,
    LifecycleSettings,
    MemorySettings,
    NightlySettings,
    VerifySettings,
)
from ami_builder.config.types import DEFAULT_REFERENCE, Destination
from ami_builder.core.errors import UsageError
from ami_builder.core.options import (
    Arch,
    Connect,
    ContainerNetwork,
    ContainerSource,
    Datasource,
    Listen,
    Network,
    Role,
)
from ami_builder.core.records import TargetKind
from ami_builder.core.units import AUTO_RESERVE, Reserve
from ami_builder.system import resources

GIB = 2**30
SHA256 = "sha256:" + "ab" * 32
DEFAULT = Image(
    name="dask",
    description="",
    base=BaseSettings(
        source=None,
        checksum=None,
        ssh_user="admin",
        suite="trixie",
        mirror="",
        packages=(),
        disk_size=8 * GIB,
        security_updates=False,
    ),
    container=ContainerSettings(
        source=ContainerSource.ARCHIVE,
        reference="ami-builder/dask:2026.8.0",
        requirements=resources.requirements(),
        packages=(),
        network=ContainerNetwork.HOST,
        bridge_subnet="198.18.0.0/16",
        instance_metadata=False,
        unlimited=(),
        insecure_registry=None,
    ),
    memory=MemorySettings(reserve=AUTO_RESERVE, nanny_headroom=None),
    dask=DaskSettings(
        role=Role.LOCAL, listen=Listen.MACHINE, workers=1, threads=None, spill_percent=80, after=()
    ),
    bake=BakeSettings(memory=2 * GIB, cpus=2, timeout=1800.0),
    verify=VerifySettings(
        memory=(2 * GIB,),
        cpus=2,
        disk_size=10 * GIB,
        datasource=Datasource.EC2,
        network=Network.ISOLATED,
        checks=(),
        timeout=900.0,
        pressure=True,
        instance_types=("m6i.large",),
    ),
    aws=AwsSettings(
        region="",
        source="136693071363/debian-13-amd64-########-####",
        instance_types=("m6i.large", "m5.large", "m7i.large"),
        subnets=(),
        connect=Connect.SSH,
        instance_profile="",
        ssh_port=22,
        source_cidrs=(),
        encrypt=False,
        kms_key="",
        spot=False,
        lifetime=7200.0,
        copy_to=(),
        share_with=(),
    ),
    lifecycle=LifecycleSettings(
        channels=("testing", "stable"), keep=3, keep_days=14, size=0, most_deletions=10, grace_days=7
    ),
    nightly=NightlySettings(
        channel="testing",
        memory_drift_percent=3,
        time_drift_percent=50,
        size_drift_percent=20,
        hold_packages=(),
    ),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of its own the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(
    text: str,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """Load `text` as ./ami-builder.toml."""
    Path("ami-builder.toml").write_text(text, encoding="utf-8")
    return loading.load(None, environ=environ or {}, overrides=flags)


def mistakes(text: str, **more: Any) -> list[str]:
    """Return the lines of the error that `text` gives."""
    with pytest.raises(UsageError) as caught:
        loaded(text, **more)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    head, *lines = caught.value.message.splitlines()
    assert head == f"the configuration has {'a mistake' if len(lines) == 1 else f'{len(lines)} mistakes'}:"
    return [line.strip() for line in lines]


# The default image ------------------------------------------------------------------------------------------


def test_an_empty_table_is_the_whole_default_image() -> None:
    assert loaded("[images.dask]").select() == DEFAULT


def test_the_shipped_file_is_the_default_image() -> None:
    shipped = loading.load(resources.default_config(), environ={})
    assert shipped.images == {"dask": DEFAULT}
    assert {setting.origin for setting in shipped.settings["dask"]} == {"default"}


def test_the_shipped_file_documents_every_setting_with_its_default() -> None:
    text = resources.default_config().read_text(encoding="utf-8")
    read = loaded(re.sub(r"(?m)^#(?=\w+ = )", "", text))
    assert {s.key for s in read.settings["dask"] if s.origin != "default"} == set(SETTINGS)
    assert read.default_image == "dask"
    assert read.images == {"dask": DEFAULT}


@pytest.mark.parametrize(
    ("file", "made"),
    [
        (
            resources.default_config(),
            reference.example_file(schema_path="docs/ami-builder.schema.json"),
        ),
        (Path(__file__).parents[2] / "docs" / "ami-builder.schema.json", reference.schema_text()),
    ],
)
def test_the_committed_files_are_made_from_the_settings(file: Path, made: str) -> None:
    assert file.read_text(encoding="utf-8") == made, "run docs/generate.py"


def test_every_setting_has_a_description_and_a_valid_example() -> None:
    valid = TypeAdapter(ImageSettings)
    for key, setting in SETTINGS.items():
        assert reference.descriptions()[key], key
        assert setting.example != setting.dump(setting.default)
        value = {setting.name: setting.example}
        valid.validate_python({setting.table: value} if setting.table else value)


def test_the_schema_describes_every_setting_as_it_is_written() -> None:
    schema = reference.json_schema()
    definitions = schema["$defs"]
    properties: dict[str, Any] = {}
    for name, field in definitions["ImageSettings"]["properties"].items():
        if "$ref" in field:
            inner = definitions[field["$ref"].rpartition("/")[2]]
            assert inner["additionalProperties"] is False
            properties |= {f"{name}.{key}": value for key, value in inner["properties"].items()}
        else:
            properties[name] = field
    assert set(properties) == set(SETTINGS)
    assert all(field["description"] for field in properties.values())
    assert definitions["Role"]["enum"] == ["local", "worker", "scheduler", "none"]
    assert properties["verify.memory"]["default"] == ["2GiB"]
    assert properties["dask.threads"]["default"] == "auto"
    # Where a default of text has a pattern, it fits: the schema would mark our own file as wrong otherwise.
    fitted = 0
    for field in properties.values():
        patterns = [
            p for option in [field, *field.get("anyOf", [])] if isinstance(p := option.get("pattern"), str)
        ]
        if patterns and isinstance(field.get("default"), str):
            words = [option.get("const") for option in field.get("anyOf", [])]
            assert field["default"] in words or re.search(patterns[0], field["default"])
            fitted += 1
    assert fitted > 5
    json.dumps(schema)


# Values and where they come from ----------------------------------------------------------------------------

FULL = """
default_image = "worker"

[defaults]
description = "ours"
base = { disk_size = "4GiB" }

[defaults.memory]
reserve = "5%"

[images.worker.dask]
role = "worker"
workers = 2
threads = 4
after = ["agent.service", "log@main.service"]
[images.worker.verify]
memory = ["1GiB", 2147483648]
checks = ["mine.py"]
timeout = "1h"
network = "nat"

[images.own]
base.source = "https://example.org/debian.qcow2"
base.checksum = "sha256:ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB"
base.ssh_user = "debian"
container.source = "registry"
container.reference = "10.0.2.2:5000/dask/dask:2026.8.0"
container.insecure_registry = "10.0.2.2:5000"
container.network = "bridge"
memory.reserve = "256MiB"
"""


def test_all_kinds_of_values(here: Path) -> None:
    (here / "mine.py").touch()
    read = loaded(FULL)
    worker, own = read.select(), read.select("own")
    assert (worker.name, worker.description, worker.base.disk_size) == ("worker", "ours", 4 * GIB)
    assert worker.memory.reserve == Reserve(percent=5)
    assert worker.dask == DaskSettings(
        role=Role.WORKER,
        listen=Listen.MACHINE,
        workers=2,
        threads=4,
        spill_percent=80,
        after=("agent.service", "log@main.service"),
    )
    assert worker.verify.memory == (GIB, 2 * GIB)
    assert worker.verify.checks == (here / "mine.py",)
    assert (worker.verify.timeout, worker.verify.network) == (3600, Network.NAT)
    assert own.base.source == "https://example.org/debian.qcow2"
    assert (own.base.checksum, own.base.ssh_user) == (SHA256, "debian")
    assert own.container == ContainerSettings(
        source=ContainerSource.REGISTRY,
        reference="10.0.2.2:5000/dask/dask:2026.8.0",
        requirements=None,
        packages=(),
        network=ContainerNetwork.BRIDGE,
        bridge_subnet="198.18.0.0/16",
        instance_metadata=False,
        unlimited=(),
        insecure_registry="10.0.2.2:5000",
    )
    assert own.memory.reserve == Reserve(bytes=2**28)


def test_the_settings_of_aws() -> None:
    text = """
[images.dask.aws]
region = "eu-central-1"
source = "ssm:/aws/service/debian/release/13/latest/amd64"
subnets = ["subnet-0123456789abcdef0"]
connect = "session-manager"
instance_profile = "arn:aws:iam::123456789012:instance-profile/ours/ssm"
source_cidrs = ["203.0.113.7", "2001:db8::/64"]
encrypt = true
kms_key = "arn:aws:kms:eu-central-1:123456789012:alias/ours"
spot = true
lifetime = "90min"
copy_to = ["eu-west-1=alias/ours", "eu-north-1=arn:aws:kms:eu-north-1:123456789012:key/1-2"]
share_with = ["123456789012", "arn:aws:organizations::123456789012:ou/o-0123456789/ou-ab12-0123456789"]
"""
    aws = (
        loaded(text, flags={"aws.spot": "false", "aws.instance_types": "t3.small,m7i-flex.large"})
        .select()
        .aws
    )
    assert aws == AwsSettings(
        region="eu-central-1",
        source="ssm:/aws/service/debian/release/13/latest/amd64",
        instance_types=("t3.small", "m7i-flex.large"),
        subnets=("subnet-0123456789abcdef0",),
        connect=Connect.SESSION_MANAGER,
        instance_profile="arn:aws:iam::123456789012:instance-profile/ours/ssm",
        ssh_port=22,
        source_cidrs=("203.0.113.7/32", "2001:db8::/64"),
        encrypt=True,
        kms_key="arn:aws:kms:eu-central-1:123456789012:alias/ours",
        spot=False,
        lifetime=5400.0,
        copy_to=(
            Destination(region="eu-west-1", kms_key="alias/ours"),
            Destination(region="eu-north-1", kms_key="arn:aws:kms:eu-north-1:123456789012:key/1-2"),
        ),
        share_with=(
            "123456789012",
            "arn:aws:organizations::123456789012:ou/o-0123456789/ou-ab12-0123456789",
        ),
    )
    assert loaded(
        "[images.dask]", flags={"aws.copy_to": "eu-west-1,us-west-2=alias/x"}
    ).select().aws.copy_to == (
        Destination(region="eu-west-1"),
        Destination(region="us-west-2", kms_key="alias/x"),
    )
    (line,) = mistakes("[images.dask]", flags={"aws.encrypt": "yes"})
    assert line == '--set: aws.encrypt = "yes": expected true or false'


def origin(read: Config, key: str, image: str = "dask") -> tuple[object, str]:
    return next((s.value, s.origin) for s in read.settings[image] if s.key == key)


def test_each_level_goes_over_the_one_before() -> None:
    key, variable = "memory.reserve", {"AMI_BUILDER_MEMORY__RESERVE": "3%"}
    defaults = '[defaults.memory]\nreserve = "1%"\n'
    image = '[images.dask.memory]\nreserve = "2.5%"\n[images.other]\n'
    assert origin(loaded("[images.dask]"), key) == ("auto", "default")
    assert origin(loaded(defaults + "[images.dask]"), key) == ("1%", "ami-builder.toml:2")
    assert origin(loaded(defaults + image), key) == ("2.5%", "ami-builder.toml:4")
    assert origin(loaded(defaults + image), key, "other") == ("1%", "ami-builder.toml:2")
    read = loaded(defaults + image, environ=variable)
    assert origin(read, key) == ("3%", "AMI_BUILDER_MEMORY__RESERVE")
    assert origin(read, key, "other") == ("3%", "AMI_BUILDER_MEMORY__RESERVE")
    read = loaded(defaults + image, environ=variable, flags={"memory.reserve": "4%"})
    assert origin(read, key) == ("4%", "--set")
    assert read.images["dask"].memory.reserve == Reserve(percent=4)
    # Only what is set goes over: the rest stays.
    assert origin(read, "dask.workers") == (1, "default")


def test_a_setting_without_a_table_has_a_variable_too() -> None:
    read = loaded("[images.dask]", environ={"AMI_BUILDER_ARCH": "aarch64"})
    assert read.images["dask"].arch is Arch.ARM64
    assert origin(read, "arch") == ("arm64", "AMI_BUILDER_ARCH")


def test_a_list_replaces_a_list_and_any_default_can_be_put_back() -> None:
    text = (
        '[defaults.base]\npackages = ["htop", "jq"]\n[defaults.dask]\nthreads = 2\n'
        '[images.dask.base]\npackages = ["vim"]\n[images.bare]\nbase.packages = []\ndask.threads = "auto"\n'
    )
    read = loaded(text)
    assert read.images["dask"].base.packages == ("vim",)
    assert read.images["bare"].base.packages == ()
    assert (read.images["dask"].dask.threads, read.images["bare"].dask.threads) == (2, None)


@pytest.mark.parametrize("level", ["environment", "flag"])
def test_text_from_outside_the_file(level: str, here: Path) -> None:
    (here / "a.py").touch()
    texts = {
        "base.packages": "htop, jq,",
        "base.disk_size": "4GiB",
        "verify.memory": "1GiB,2147483648",
        "verify.checks": "a.py",
        "dask.threads": "3",
        "dask.workers": " 2 ",
        "dask.after": "",
        "bake.timeout": "90",
        "verify.datasource": "nocloud",
    }
    if level == "flag":
        read = loaded("[images.dask]", flags=texts)
    else:
        variables = {f"AMI_BUILDER_{key.upper().replace('.', '__')}": text for key, text in texts.items()}
        read = loaded("[images.dask]", environ=variables)
    image = read.select()
    assert image.base.packages == ("htop", "jq")
    assert image.base.disk_size == 4 * GIB
    assert image.verify.memory == (GIB, 2 * GIB)
    assert image.verify.checks == (here / "a.py",)
    assert (image.dask.threads, image.dask.workers, image.dask.after) == (3, 2, ())
    assert (image.bake.timeout, image.verify.datasource) == (90, Datasource.NOCLOUD)


def test_paths_start_where_they_were_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("project", "elsewhere"):
        (here / folder).mkdir()
        (here / folder / "check.py").touch()
    file = here / "project" / "ami-builder.toml"
    file.write_text('[images.dask.verify]\nchecks = ["check.py"]\n', encoding="utf-8")
    monkeypatch.chdir(here / "elsewhere")
    assert loading.load(file, environ={}).select().verify.checks == (here / "project" / "check.py",)
    read = loading.load(file, environ={}, overrides={"verify.checks": "check.py"})
    assert read.select().verify.checks == (here / "elsewhere" / "check.py",)


def test_settings_are_shown_as_toml_writes_them() -> None:
    read = loaded(
        '[images.dask]\ndescription = "é"\ndask.after = ["a.service"]\n',
        flags={"base.disk_size": "4294967296"},
    )
    written = "\n".join(f"{setting.key} = {setting.text}" for setting in read.settings["dask"])
    again = tomllib.loads(written)
    assert again["description"] == "é"
    assert again["dask"] == {
        "role": "local",
        "workers": 1,
        "instance_store": True,
        "threads": "auto",
        "listen": "127.0.0.1",
        "spill_percent": 80,
        "after": ["a.service"],
        "retire_on_rebalance": False,
    }
    assert again["base"]["disk_size"] == "4GiB"
    rewritten = loaded("\n".join(f"images.dask.{line}" for line in written.splitlines()))
    assert rewritten.images == read.images
    assert SettingValue(key="a", value=None, origin="b").text == "null"


# Which file, which image ------------------------------------------------------------------------------------


def test_where_the_file_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = here / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert loading.find(None, {}) == resources.default_config()
    above = here / "ami-builder.toml"
    above.touch()
    assert loading.find(None, {}) == above
    own = deep / "ami-builder.toml"
    own.touch()
    assert loading.find(None, {}) == own
    assert loading.find(None, {"AMI_BUILDER_CONFIG": ""}) == own
    assert loading.find(None, {"AMI_BUILDER_CONFIG": "other.toml"}) == Path("other.toml")
    assert loading.find(Path("flag.toml"), {"AMI_BUILDER_CONFIG": "other.toml"}) == Path("flag.toml")


def test_which_image_is_meant() -> None:
    two = "[images.dask]\n[images.gpu]\n"
    assert loaded("[images.only]").select().name == "only"
    assert loaded('default_image = "gpu"\n' + two).select().name == "gpu"
    assert loaded(two).select("gpu").name == "gpu"
    with pytest.raises(UsageError, match="no image was named") as caught:
        loaded(two).select()
    assert "dask, gpu" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"there is no image dsk; did you mean dask\?") as caught:
        loaded(two).select("dsk")
    assert "dask, gpu" in str(caught.value.hint)


# Mistakes ---------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_named_at_once() -> None:
    text = """default_image = "dsk"
[default]
[defaults.memory]
reserve = "5%%"
[images.dask]
reserve = 1
bake.cpus = "two"
[images.dask.dask]
role = "Worker"
spil_percent = 5
after = [
  "fine.service",
  "agent",
]
[images.dask.verify]
memory = "2GiB"
disk_size = "4GiB"
checks = ["missing.py"]
[images."Bad Name"]
[images.gpu]
memory = 7
"""
    found = mistakes(
        text,
        environ={
            "AMI_BUILDER_BAKE__CPU": "2",
            "AMI_BUILDER_BAKE__TIMEOUT": "soon",
            "AMI_BUILDER_MEMORY_RESERVE": "5%",
            "AMI_BUILDER_HOME": "/somewhere",
        },
        flags={"dask.worker": "2", "bake.memory": "2GB"},
    )
    missing = Path.cwd() / "missing.py"
    value = f'["{missing}"]' if len(str(missing)) < 57 else f'["{missing}'[:56] + " …"
    assert sorted(found) == sorted(
        [
            'ami-builder.toml:1: default_image = "dsk": expected the name of an image; did you mean dask?',
            "ami-builder.toml:2: default: unknown key; did you mean defaults?",
            'ami-builder.toml:4: defaults.memory.reserve = "5%%": expected a percentage from 0% to less than'
            " 100%, with at most two decimals",
            "ami-builder.toml:6: images.dask.reserve: unknown key; did you mean memory.reserve?",
            'ami-builder.toml:7: images.dask.bake.cpus = "two": expected a whole number from 1 to 255',
            'ami-builder.toml:9: images.dask.dask.role = "Worker": expected one of local, worker, scheduler,'
            " none; did you mean worker?",
            "ami-builder.toml:10: images.dask.dask.spil_percent: unknown key; did you mean spill_percent?",
            'ami-builder.toml:11: images.dask.dask.after[1] = "agent": expected a systemd unit with its'
            " ending, not Dask's own",
            'ami-builder.toml:16: images.dask.verify.memory = "2GiB": expected a list such as ["2GiB"]',
            'ami-builder.toml:17: images.dask.verify.disk_size = "4GiB": expected at least base.disk_size,'
            " which is 8GiB",
            f"ami-builder.toml:18: images.dask.verify.checks = {value}: expected a file, but {missing}"
            " does not exist",
            'ami-builder.toml:19: images."Bad Name" = "Bad Name": expected a name of a-z, 0-9 and -, at most'
            " 63 characters",
            "ami-builder.toml:21: images.gpu.memory = 7: expected a table",
            "AMI_BUILDER_BAKE__CPU: unknown setting; did you mean AMI_BUILDER_BAKE__CPUS?",
            'AMI_BUILDER_BAKE__TIMEOUT: bake.timeout = "soon": expected a duration such as 10min, 300s or'
            " 1h, or a number of seconds",
            "AMI_BUILDER_MEMORY_RESERVE: unknown setting; did you mean AMI_BUILDER_MEMORY__RESERVE?",
            "--set: dask.worker: unknown setting; did you mean dask.workers?",
            '--set: bake.memory = "2GB": expected a size such as 2GiB or 512MiB, or a whole number of bytes;'
            " did you mean 2GiB?",
        ]
    )


class Bad(NamedTuple):
    setting: str
    expected: str


BAD = [
    Bad('base.source = ""', "expected debian, or the path"),
    Bad('base.source = "ftp://example.org/x.qcow2"', "expected debian, or the path"),
    Bad('base.source = "https:///x.qcow2"', "expected debian, or the path"),
    Bad('base.source = "http://[x/y"', "expected debian, or the path"),
    Bad('base.source = "https://example.org:99999/x"', "expected debian, or the path"),
    Bad('base.source = "https://me:secret@example.org/x"', "without a name or password"),
    Bad('base.source = "a\\u0000b"', "expected the path of a file"),
    Bad('base.source = "~nobody-at-all/x"', "home folder"),
    Bad("base.source = 1", "expected debian, or the path"),
    Bad('base.source = "missing.qcow2"', "missing.qcow2 does not exist"),
    Bad('base.source = "folder"', "folder is not a file"),
    Bad(f'base.source = "{"x" * 300}"', "can't be accessed: File name too long"),
    Bad('base.source = "https://example.org/x.qcow2"', "expected the checksum"),
    Bad('base.checksum = "md5:abc"', "expected sha256: with 64"),
    Bad(f'base.checksum = "{SHA256[7:]}"', "did you mean sha256:abababab…?"),
    Bad(f'base.checksum = "{SHA256}0"', "expected sha256: with 64"),
    Bad('base.ssh_user = "debian"', "expected admin, the user on a disk of Debian packages"),
    Bad('base.ssh_user = "Root"', "the name of a Linux user"),
    Bad('container.bridge_subnet = "10.0.0.0/30"', "expected an IPv4 network such as 10.200.0.0/16"),
    Bad('container.bridge_subnet = "10.0.0.1/16"', "has host bits set"),
    Bad('container.unlimited = ["a b"]', "the name of a container, or a pattern"),
    Bad('dask.listen = "127.0.0.2"', "127.0.0.1"),
    Bad('dask.after = ["dask-memory.service"]', "not Dask's own"),
    Bad('base.suite = "trixie main"', "the name of a Debian suite"),
    Bad('base.mirror = "deb http://x y"', "URL of a Debian mirror"),
    Bad("base.mirror = false", "URL of a Debian mirror"),
    Bad('base.packages = "htop"', "expected a list"),
    Bad('base.packages = ["--purge"]', "the name of a Debian package"),
    Bad('base.packages = ["jq", "jq"]', "expected each item once"),
    Bad('base.disk_size = "1GiB"', "expected whole MiB from 2GiB"),
    Bad("base.disk_size = 8589934593", "expected whole MiB from 2GiB"),
    Bad('base.disk_size = "12GiB"', "expected at least base.disk_size, which is 12GiB"),
    Bad('container.source = "register"', "did you mean registry?"),
    Bad('container.source = "registry"', "expected a reference to pull"),
    Bad('container.reference = "dask"', "name:tag"),
    Bad('container.reference = "Dask/dask:1"', "name:tag"),
    Bad('container.reference = "dask:1:2"', "name:tag"),
    Bad('container.reference = "a//b:1"', "name:tag"),
    Bad('container.reference = "x@sha256:12"', "name:tag"),
    Bad('container.reference = "ghcr.io/dask/dask:2026.8.0"', 'set container.source to "registry"'),
    Bad('container.reference = "localhost/dask:1"', 'set container.source to "registry"'),
    Bad(f'container.reference = "dask@{SHA256}"', 'set container.source to "registry"'),
    Bad('container.requirements = "missing.txt"', "missing.txt does not exist"),
    Bad('verify.checks = [""]', "expected the path of a file"),
    Bad('container.insecure_registry = "x"', "host:port"),
    Bad('container.network = "none"', "host"),
    Bad('container.network = "Host"', "host"),
    Bad("container.network = true", "host"),
    Bad('container.insecure_registry = "x:5000"', "has no effect"),
    Bad('memory.reserve = "2GiB"', "expected less than the smallest verify.memory, which is 2GiB"),
    Bad(
        'memory.nanny_headroom = "1025MiB"',
        "expected at most half of the smallest verify.memory, which is 2GiB",
    ),
    Bad('memory.nanny_headroom = "5%"', "expected a size such as"),
    Bad('memory.reserve = "-1"', "expected a size such as 256MiB, a percentage"),
    Bad('memory.reserve = "1GB"', "did you mean 1GiB?"),
    Bad("memory.reserve = 0.05", "expected a size such as 256MiB, a percentage"),
    Bad("dask.workers = 0", "expected a whole number from 1"),
    Bad("dask.workers = true", "expected a whole number from 1"),
    Bad('dask.workers = "2"', "expected a whole number from 1"),
    Bad("dask.workers = 1.0", "expected a whole number from 1"),
    Bad(f"dask.workers = 0x{'f' * 6000}", "expected a whole number from 1"),
    Bad('dask.threads = "many"', "expected a whole number from 1 to 1024, or auto"),
    Bad('memory.nanny_headroom = "automatic"', "or a whole number of bytes, or auto"),
    Bad("dask.spill_percent = 101", "expected a whole number from 1 to 100"),
    Bad('dask.after = ["dask.service"]', "not Dask's own"),
    Bad('dask.after = ["dask-health.timer"]', "not Dask's own"),
    Bad('dask.after = ["a b.service"]', "a systemd unit"),
    Bad('dask.after = ["log@.service"]', "a systemd unit"),
    Bad('bake.memory = "256MiB"', "expected whole MiB from 512MiB"),
    Bad('bake.memory = "25TiB"', "expected whole MiB from 512MiB to 24TiB"),
    Bad("bake.cpus = 256", "expected a whole number from 1 to 255"),
    Bad('bake.timeout = "10m"', "did you mean 10min?"),
    Bad("bake.timeout = 0", "expected a duration"),
    Bad("bake.timeout = nan", "expected a duration"),
    Bad("bake.timeout = 2026-08-01", "expected a duration"),
    Bad("verify.memory = []", "expected at least one item"),
    Bad('verify.memory = ["2GiB", "2048MiB"]', "expected each item once"),
    Bad('verify.memory = ["256MiB"]', "expected whole MiB from 512MiB"),
    Bad('verify.checks = ["folder"]', "folder is not a file"),
    Bad('verify.datasource = "aws"', "expected one of ec2, nocloud"),
    Bad('verify.network = "isolate"', "did you mean isolated?"),
    Bad('arch = "arm"', "expected amd64 or arm64, or nothing"),
    Bad('verify.instance_types = ["large"]', "expected an EC2 instance type"),
    Bad('aws.region = "Frankfurt"', "expected an AWS region, or nothing"),
    Bad('aws.source = "debian-13"', "expected owner/name pattern, ssm:/parameter or ami-…"),
    Bad('aws.source = "ami-123"', "expected owner/name pattern"),
    Bad('aws.source = "ssm:debian"', "expected owner/name pattern"),
    Bad('aws.instance_types = ["m6i.large", "m6i.large"]', "expected each item once"),
    Bad('aws.subnets = ["vpc-12345678"]', "expected the id of a subnet"),
    Bad('aws.connect = "session"', "did you mean session-manager?"),
    Bad('aws.connect = "session-manager"', "expected ssh, or an aws.instance_profile"),
    Bad('aws.instance_profile = "a profile"', "the name or ARN of an instance profile"),
    Bad("aws.ssh_port = 0", "expected a whole number from 1 to 65535"),
    Bad('aws.source_cidrs = ["0.0.0.0/0"]', "ssh is not opened to everybody"),
    Bad('aws.source_cidrs = ["::/0"]', "ssh is not opened to everybody"),
    Bad('aws.source_cidrs = ["128.0.0.0/1"]', "no wider than /8"),
    Bad('aws.source_cidrs = ["203.0.113.7/8"]', "has host bits set"),
    Bad('aws.source_cidrs = ["here"]', "expected addresses such as 203.0.113.7/32"),
    Bad("aws.source_cidrs = [1]", "expected addresses such as 203.0.113.7/32"),
    Bad('aws.encrypt = "true"', "expected true or false"),
    Bad("aws.encrypt = 1", "expected true or false"),
    Bad('aws.kms_key = "alias/ours"', "has no effect, because aws.encrypt is false"),
    Bad('aws.kms_key = "two words"', "alias/… or ARN of a KMS key"),
    Bad("aws.spot = []", "expected true or false"),
    Bad('nightly.channel = "nowhere"', "expected one of lifecycle.channels: testing, stable"),
    Bad('aws.lifetime = "8000h"', "expected a duration"),
    Bad('aws.copy_to = ["Ireland"]', "expected a region, or region=KEY"),
    Bad('aws.copy_to = ["eu-west-1="]', "expected a region, or region=KEY"),
    Bad('aws.copy_to = ["eu-west-1=two words"]', "expected a region, or region=KEY"),
    Bad("aws.copy_to = [1]", "expected a region, or region=KEY"),
    Bad('aws.copy_to = ["eu-west-1", "eu-west-1"]', "expected each item once"),
    Bad('aws.copy_to = ["eu-west-1", "eu-west-1=alias/x"]', "but eu-west-1 is listed several times"),
    Bad('aws.copy_to = ["us-east-1", "cn-north-1"]', "expected regions of one partition"),
    Bad('aws.copy_to = ["eu-west-1", "eusc-de-east-1"]', "expected regions of one partition"),
    Bad(
        'aws.copy_to = ["eu-west-1=arn:aws:kms:us-east-1:123456789012:key/1-2"]',
        "expected a key of eu-west-1",
    ),
    Bad('aws = { region = "eu-west-1", copy_to = ["eu-west-1"] }', "eu-west-1 is where the AMI is baked"),
    Bad('aws.share_with = ["1234"]', "expected the 12 digits of an account"),
    Bad('aws.share_with = ["all"]', "expected the 12 digits of an account"),
    Bad('aws = { encrypt = true, share_with = ["123456789012"] }', "with the default key can't be shared"),
    Bad(
        'aws = { encrypt = true, kms_key = "ours", copy_to = ["eu-west-1"], share_with = ["123456789012"] }',
        "write eu-west-1=KEY in aws.copy_to",
    ),
    Bad(
        'aws = { copy_to = ["eu-west-1=alias/aws/ebs"], share_with = ["123456789012"] }',
        "with the default key can't be shared",
    ),
    Bad('description = "two\\nlines"', "one line"),
    Bad("verify = 1", "expected a table"),
    Bad("verify = []", "expected a table"),
    Bad('aws_secret_access_key = "x"', "unknown key"),
    Bad('bake.password = "x"', "unknown key"),
    Bad('memory.workers = "x"', "did you mean dask.workers?"),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.setting[:60] for bad in BAD])
def test_one_mistake_is_one_line_with_its_place(bad: Bad, here: Path) -> None:
    (here / "folder").mkdir()
    (line,) = mistakes(f"[images.dask]\n\n{bad.setting}\n")
    key = bad.setting.partition(" = ")[0]
    # A default is never what is to be changed: the place is that of what was written.
    written = {"base.disk_size": "verify.disk_size"} if "expected at least base" in line else {}
    written |= {"base.source": "base.checksum"} if "expected the checksum" in line else {}
    written |= {"container.source": "container.reference"} if "expected a reference" in line else {}
    assert line.startswith(f"ami-builder.toml:3: images.dask.{written.get(key, key)}")
    assert bad.expected in line
    assert len(line) < 600


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_no_setting_takes_every_type(key: str) -> None:
    """Each setting refuses a date; all but lists refuse a list; all but numbers refuse a float."""
    assert mistakes(f"[images.dask]\n{key} = 1979-05-27\n")[0].startswith(
        f"ami-builder.toml:2: images.dask.{key}"
    )
    assert mistakes(f"[images.dask]\n{key} = {{}}\n")[0].startswith(f"ami-builder.toml:2: images.dask.{key}")


def test_the_structure_of_the_file() -> None:
    assert mistakes("") == [
        "ami-builder.toml:1: there is no image: add a table [images.NAME], which may be empty"
    ]
    assert len(mistakes("[images]")) == 1
    assert mistakes("images = 5") == ["ami-builder.toml:1: images = 5: expected a table"]
    assert mistakes("[[images]]\nx = 1") == ['ami-builder.toml:1: images = [{"x": 1}]: expected a table']
    assert mistakes("[images]\ndask = 5") == ["ami-builder.toml:2: images.dask = 5: expected a table"]
    assert mistakes("[image.dask]\n[images.dask]") == [
        "ami-builder.toml:1: image: unknown key; did you mean images?"
    ]
    assert mistakes("[memory]\n[images.dask]") == [
        "ami-builder.toml:1: memory: unknown key; did you mean defaults.memory?"
    ]
    assert mistakes("[images.dask]\n[images.dask.memmory]\nreserve = 1") == [
        "ami-builder.toml:2: images.dask.memmory: unknown key; did you mean memory?"
    ]
    assert mistakes("default_image = 5\n[images.dask]")[0].startswith(
        "ami-builder.toml:1: default_image = 5:"
    )


@pytest.mark.parametrize("word", ["arm64", "aarch64"])
def test_an_architecture_decides_about_what_aws_bakes_on(word: str) -> None:
    image = loaded(f'[images.dask]\narch = "{word}"\n').select()
    assert image.arch is Arch.ARM64
    assert image.aws.source == "136693071363/debian-13-arm64-########-####"
    assert image.aws.instance_types[0] == image.verify.instance_types[0] == "m7g.large"
    own = loaded(f'[images.dask]\narch = "{word}"\n', flags={"aws.source": "self/ours"}).select()
    assert own.aws.source == "self/ours"


def test_without_an_architecture_the_target_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    settings = ImageSettings()
    assert settings.image("dask").arch is Arch.ARM64
    assert settings.image("dask", TargetKind.AWS).arch is Arch.AMD64
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert settings.image("dask").arch is Arch.AMD64


def test_one_mistake_in_the_defaults_is_named_once() -> None:
    text = '[defaults.base]\nsource = "missing"\n[images.a]\n[images.b]\n'
    (line,) = mistakes(text)
    assert line.startswith("ami-builder.toml:2: defaults.base.source")


def test_a_conflict_is_laid_to_the_one_who_made_it() -> None:
    assert mistakes("[images.dask]", flags={"base.disk_size": "20GiB"}) == [
        '--set: images.dask.verify.disk_size = "10GiB" (the default): expected at least base.disk_size, which'
        " is 20GiB"
    ]
    variables = {"AMI_BUILDER_MEMORY__RESERVE": "3GiB"}
    assert mistakes("[images.dask]", environ=variables) == [
        'AMI_BUILDER_MEMORY__RESERVE: memory.reserve = "3GiB": expected less than the smallest verify.memory,'
        " which is 2GiB"
    ]


def test_a_night_goes_to_a_channel_that_there_is() -> None:
    text = '[images.dask]\nlifecycle.channels = ["canary"]\nnightly.channel = "testing"\n'
    (line,) = mistakes(text)
    assert line.startswith('ami-builder.toml:3: images.dask.nightly.channel = "testing": expected one of')
    assert line.endswith("lifecycle.channels: canary")
    assert loaded(text.replace("testing", "canary")).select().nightly.channel == "canary"
    assert loaded(text.replace("testing", "")).select().nightly.channel == "canary"


def test_nothing_is_said_about_what_depends_on_a_mistake() -> None:
    url = 'base.source = "https://example.org/x"\nbase.checksum = "sha256"\n'
    (line,) = mistakes(f"[images.dask]\n{url}")
    assert "images.dask.base.checksum" in line


def test_one_wrong_table_hides_nothing_else_of_its_image() -> None:
    assert len(mistakes('[images.dask]\ndask = 5\nverify.disk_size = "4GiB"\n')) == 2


def test_the_file_goes_wrong_where_no_image_would_notice() -> None:
    """A value that another level overrides is still a mistake."""
    text = "[defaults.dask]\nworkers = 0\n[images.dask.dask]\nworkers = 1\n"
    assert len(mistakes(text, flags={"dask.workers": "2"})) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[images.dask]\na = \n", r"^ami-builder.toml:2:5: not valid TOML: Invalid value$"),
        (b"[images.dask", r"^ami-builder.toml: not valid TOML: .*end of document"),
        (b"a = 1\na = 2\n", r"^ami-builder.toml:2:6: not valid TOML: Cannot overwrite a value$"),
        (b"[images.dask]\n# \xff\n", r"^ami-builder.toml:2: not UTF-8 text"),
        (b"a = " + b"[" * 5000, r"^ami-builder.toml: not valid TOML: nested too deeply$"),
        (b"a = " + b"9" * 5000, r"^ami-builder.toml: not valid TOML: Exceeds the limit"),
    ],
)
def test_what_is_no_toml(content: bytes, message: str, here: Path) -> None:
    (here / "ami-builder.toml").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        loading.load(None, environ={})
    assert "ami-builder.toml" in str(caught.value.hint)


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert loaded("\ufeff[images.dask]").images.keys() == {"dask"}


def test_what_can_not_be_read(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "dangling").symlink_to(here / "nothing")
    for name, reason in {
        "folder": "Is a directory",
        "missing.toml": "No such file or directory",
        "dangling": "it is a symbolic link to .*nothing, which does not exist",
        "folder/../missing/x": "No such file or directory",
    }.items():
        with pytest.raises(UsageError, match=f"^{name} can't be read: {reason}"):
            loading.load(Path(name), environ={})
        with pytest.raises(UsageError, match=f"^{name} can't be read: {reason}") as caught:
            loading.load(None, environ={"AMI_BUILDER_CONFIG": name})
        assert str(caught.value.hint).startswith("AMI_BUILDER_CONFIG names it; ")


def test_a_file_that_is_there_but_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The shipped settings are for a folder without a file, and not for one whose file is lost.
    monkeypatch.chdir(here)
    file = here / "ami-builder.toml"
    file.unlink(missing_ok=True)
    file.symlink_to("nowhere.toml")
    with pytest.raises(UsageError, match=r"ami-builder\.toml can't be read: .* link to nowhere\.toml"):
        loading.load(None, environ={})
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match=r"ami-builder\.toml can't be read: Is a directory"):
        loading.load(None, environ={})
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(UsageError, match="it is a FIFO"):
        loading.load(None, environ={})


def test_an_unreadable_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (here / "ami-builder.toml").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(UsageError, match=r"^ami-builder.toml can't be read: Permission denied$"):
        loading.load(None, environ={})


def test_flags_are_pairs() -> None:
    pairs = loading.overrides_from(["memory.reserve=5%", "base.source=a=b", "memory.reserve = 6%"])
    assert pairs == {"memory.reserve": " 6%", "base.source": "a=b"}
    assert loaded("[images.dask]", flags={"memory.reserve": " 6%"}).select().memory.reserve == Reserve(
        percent=6
    )
    with pytest.raises(UsageError, match=r"^--set memory.reserve: expected KEY=VALUE$"):
        loading.overrides_from(["memory.reserve"])


def test_which_variables_are_settings() -> None:
    others = {
        "AMI_BUILDER_HOME": "x",
        "AMI_BUILDER_CACHE": "x",
        "AMI_BUILDER_DEBUG": "1",
        "MEMORY__RESERVE": "x",
    }
    assert loaded("[images.dask]", environ=others).select() == DEFAULT
    for variable in (
        "AMI_BUILDER_memory__reserve",
        "AMI_BUILDER_MEMORY__RESERV",
        "AMI_BUILDER_MEMORY_RESERVE",
    ):
        assert mistakes("[images.dask]", environ={variable: "0"}) == [
            f"{variable}: unknown setting; did you mean AMI_BUILDER_MEMORY__RESERVE?"
        ]


# Lines of keys ---------------------------------------------------------------------------------------------

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


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.sampled_from("ab.-_ \"'#=[]é\\"), max_size=4),
        st.integers()
        | st.text(st.sampled_from("\"'\\\n#=[]{},. "), max_size=8)
        | st.dictionaries(st.text("ab.", max_size=2), st.text("\n[a]=", max_size=8), max_size=2),
        max_size=5,
    )
)
def test_every_key_is_found_and_not_before_its_line(content: dict[str, Any]) -> None:
    text = tomlkit.dumps(content)
    lines = key_lines(text)
    assert {path[0] for path in lines} == set(content)
    for path, line in lines.items():
        with suppress(tomllib.TOMLDecodeError):
            value: Any = tomllib.loads("\n".join(text.split("\n")[: line - 1]))
            for part in path[:-1]:
                value = value.get(part, {})
            assert path[-1] not in value


# Anything at all --------------------------------------------------------------------------------------------

scalars = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.dates()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(
        ["debian", "registry", "2GiB", "5%", "10min", "https://x/y", DEFAULT_REFERENCE, "x@y:1"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
)
tables = st.dictionaries(
    st.sampled_from([*{key.partition(".")[0] for key in SETTINGS}, "other"]),
    st.dictionaries(
        st.sampled_from([*{key.rpartition(".")[2] for key in SETTINGS}, "other"]), values, max_size=4
    )
    | values,
    max_size=4,
)
files = st.fixed_dictionaries(
    {}, optional={"default_image": values, "defaults": tables | values, "images": values}
) | st.fixed_dictionaries({"images": st.dictionaries(st.sampled_from(["dask", "Bad", ""]), tables | values)})
texts = st.dictionaries(
    st.sampled_from(sorted(SETTINGS)), st.text(max_size=10) | st.sampled_from(["1", "5%"]), max_size=3
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, texts, texts)
@example({"default_image": "0", "images": False}, {}, {})
@example({"default_image": "0", "images": [False]}, {}, {})
def test_whatever_is_written_ends_in_images_or_a_usage_error(
    content: dict[str, Any], variables: dict[str, str], flags: dict[str, str]
) -> None:
    Path("ami-builder.toml").write_text(tomlkit.dumps(content), encoding="utf-8")
    environ = {f"AMI_BUILDER_{key.upper().replace('.', '__')}": text for key, text in variables.items()}
    with suppress(UsageError):
        read = loading.load(None, environ=environ, overrides=flags)
        assert read.images


def test_what_needs_no_configuration_does_not_pay_for_pydantic() -> None:
    code = (
        "import sys, ami_builder.core.records, ami_builder.system.resources, ami_builder.core.units\n"
        "print('pydantic' in sys.modules)"
    )
    top = Path(loading.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=top)
    assert done.stdout.strip() == "False"

"""instance-metadata and dask-aws outside a VM: real curl, our metadata service, botocore's own signature."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from ami_builder.system import resources
from tests.fake_programs import fake
from tests.http_recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.http_recorder import Request

SBIN = resources.packer_dir() / "guest/usr/local/sbin"
ACCESS, SECRET, TOKEN = "ASIA0123456789ABCDEF", "se/cr+et/KEY=", "IQoJb3JpZ2luX2VjE//+token=="
CREDENTIALS = {
    "Code": "Success",
    "LastUpdated": "2026-08-01T08:00:00Z",
    "Type": "AWS-HMAC",
    "AccessKeyId": ACCESS,
    "SecretAccessKey": SECRET,
    "Token": TOKEN,
    "Expiration": "2026-08-01T14:00:00Z",
}


def give_role(server: MetadataServer, indent: int | None = 2) -> None:
    """Let the instance have a role, as an instance profile does."""
    server.tree.announce("iam/security-credentials/dask-worker", json.dumps(CREDENTIALS, indent=indent))


@pytest.fixture
def imds() -> Iterator[MetadataServer]:
    metadata = InstanceMetadata(instance_id="i-0123456789abcdef0", region="eu-central-1")
    with MetadataServer(metadata) as server:
        yield server


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SBIN / program), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def metadata(imds: MetadataServer, path: str) -> subprocess.CompletedProcess[str]:
    return run("instance-metadata", path, INSTANCE_METADATA_URL=f"http://127.0.0.1:{imds.port}")


@pytest.mark.parametrize("path", ["instance-id", "/instance-id"])
def test_a_value_is_printed(imds: MetadataServer, path: str) -> None:
    done = metadata(imds, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "i-0123456789abcdef0\n", "")


def test_a_value_with_a_colon_in_its_name_is_printed(imds: MetadataServer) -> None:
    imds.tree.announce("tags/instance/aws:autoscaling:groupName", "workers and more")
    assert metadata(imds, "tags/instance/aws:autoscaling:groupName").stdout == "workers and more\n"


def test_a_value_that_is_not_there_is_told_from_a_service_that_is_not(imds: MetadataServer) -> None:
    done = metadata(imds, "spot/instance-action")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = run("instance-metadata", "instance-id", INSTANCE_METADATA_URL=f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_service_of_version_1_alone_is_none() -> None:
    """Other clouds answer at the same address."""
    with Recorder(status=404) as other:
        assert run("instance-metadata", "instance-id", INSTANCE_METADATA_URL=other.url).returncode == 2


@contextmanager
def settings(root: Path, *lines: str) -> Iterator[dict[str, str]]:
    (root / "etc/dask").mkdir(parents=True)
    (root / "etc/dask/dask.env").write_text("\n".join(("DASK_ROLE=worker", *lines, "")))
    yield {"DASK_AWS_ROOT": str(root)}


def call(
    imds: MetadataServer, root: Path, endpoint: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    with settings(
        root, "# DASK_AWS_ENDPOINT=http://no.test", f"DASK_AWS_ENDPOINT='{endpoint}/'\r"
    ) as environment:
        url = f"http://127.0.0.1:{imds.port}"
        return run("dask-aws", *arguments, INSTANCE_METADATA_URL=url, **environment)


def authorization(request: Request) -> dict[str, str]:
    """Return the parts of the header Authorization."""
    return dict(part.split("=", 1) for part in request.headers["Authorization"].split(" ", 1)[1].split(", "))


def signed_by_botocore(request: Request, url: str, service: str) -> str:
    """Return the signature that botocore gives the same request, at the same time."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    names = authorization(request)["SignedHeaders"].split(";")
    again = AWSRequest(
        method="POST",
        url=url + request.path,
        headers={name: headers[name] for name in names if name != "host"},
        data=request.body,
    )
    again.context["timestamp"] = headers["x-amz-date"]
    signer = botocore.auth.SigV4Auth(Credentials(ACCESS, SECRET, TOKEN), service, "eu-central-1")
    found: str = signer.signature(signer.string_to_sign(again, signer.canonical_request(again)), again)
    return found


@pytest.mark.parametrize(
    ("service", "action", "body", "target", "sent"),
    [
        (
            "secretsmanager",
            "GetSecretValue",
            '{"SecretId": "dask \\\\ \\"tls\\""}',
            "secretsmanager.GetSecretValue",
            '{"SecretId": "dask \\\\ \\"tls\\""}',
        ),
        ("ssm", "GetParameter", '{"Name": "/dask/tls"}', "AmazonSSM.GetParameter", '{"Name": "/dask/tls"}'),
        (
            "autoscaling",
            "SetInstanceHealth",
            "InstanceId=i-0&HealthStatus=Unhealthy",
            None,
            "Action=SetInstanceHealth&Version=2011-01-01&InstanceId=i-0&HealthStatus=Unhealthy",
        ),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_call_is_signed_as_botocore_signs_it(
    imds: MetadataServer,
    tmp_path: Path,
    service: str,
    action: str,
    body: str,
    target: str | None,
    sent: str,
    indent: int | None,
) -> None:
    give_role(imds, indent)
    with Recorder(answer=b'{"SecretString": "text"}') as aws:
        done = call(imds, tmp_path, aws.url, service, action, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"SecretString": "text"}\n', "")
    (request,) = aws.requests
    assert (request.path, request.body) == ("/", sent.encode())
    assert request.headers.get("X-Amz-Target") == target
    assert request.headers["Content-Type"] == (
        "application/x-amz-json-1.1" if target else "application/x-www-form-urlencoded"
    )
    signed = authorization(request)
    assert signed["Credential"].startswith(f"{ACCESS}/")
    assert signed["Credential"].endswith(f"/eu-central-1/{service}/aws4_request")
    assert set(signed["SignedHeaders"].split(";")) == {
        "content-type",
        "host",
        "x-amz-date",
        "x-amz-security-token",
        *(["x-amz-target"] if target else []),
    }
    assert signed["Signature"] == signed_by_botocore(request, aws.url, service)


def test_a_refusal_is_told_with_what_aws_says(imds: MetadataServer, tmp_path: Path) -> None:
    give_role(imds)
    with Recorder(status=400, answer=b'{"__type":"AccessDeniedException"}') as aws:
        done = call(imds, tmp_path, aws.url, "ssm", "GetParameter", "{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f'dask-aws: ssm GetParameter: {aws.url} answers 400: {{"__type":"AccessDeniedException"}}\n'
    )


def test_an_endpoint_that_does_not_answer_is_told(imds: MetadataServer, tmp_path: Path) -> None:
    give_role(imds)
    done = call(imds, tmp_path, "http://127.0.0.1:1", "ssm", "GetParameter", "{}")
    assert done.returncode == 1
    assert "ssm GetParameter: http://127.0.0.1:1 does not answer" in done.stderr


def test_without_an_endpoint_of_ones_own_it_is_the_regions(imds: MetadataServer, tmp_path: Path) -> None:
    give_role(imds)
    programs = tmp_path / "programs"
    fake(programs, "curl", 'case "$*" in *--aws-sigv4*) exit 6 ;; esac; exec /usr/bin/curl "$@"')
    url = f"http://127.0.0.1:{imds.port}"
    path = f"{programs}:{os.environ['PATH']}"
    with settings(tmp_path) as more:
        done = run(
            "dask-aws", "ssm", "GetParameter", "{}", **{**more, "PATH": path, "INSTANCE_METADATA_URL": url}
        )
    assert "https://ssm.eu-central-1.amazonaws.com does not answer" in done.stderr
    assert SECRET not in (programs / "curl.calls").read_text()
    assert TOKEN not in (programs / "curl.calls").read_text()


@pytest.mark.parametrize(
    ("version", "works"),
    [("7.81.0", False), ("7.86.0", False), ("7.87.0", True), ("8.14.1", True), ("10.0.0", True), ("", False)],
)
def test_a_curl_that_cannot_sign_is_refused(
    imds: MetadataServer, tmp_path: Path, version: str, works: bool
) -> None:
    programs = tmp_path / "programs"
    fake(
        programs,
        "curl",
        f'case $1 in --version) echo "curl {version} (x86_64)"; exit ;; esac; exec /usr/bin/curl "$@"',
    )
    path = f"{programs}:{os.environ['PATH']}"
    done = run(
        "dask-aws",
        "ssm",
        "GetParameter",
        "{}",
        PATH=path,
        INSTANCE_METADATA_URL=f"http://127.0.0.1:{imds.port}",
    )
    assert done.returncode == 2
    assert ("this instance has no role" if works else "curl 7.87 or later") in done.stderr


def test_a_machine_outside_ec2_and_a_service_that_is_not_served_are_told(tmp_path: Path) -> None:
    done = run("dask-aws", "ssm", "GetParameter", "{}", INSTANCE_METADATA_URL="http://127.0.0.1:1")
    assert (done.returncode, done.stderr) == (2, "dask-aws: this machine has no EC2 instance metadata\n")
    done = run("dask-aws", "s3", "ListBuckets", "{}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'s3' is not" in done.stderr

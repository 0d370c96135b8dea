"""What EC2's metadata service answers, and each thing that it refuses."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from ami_builder.core.errors import UsageError
from ami_builder.qemu.imds import MAX_TOKEN_SECONDS, MAX_USER_DATA, InstanceMetadata, MetadataServer

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGNnVmE0 someone"
USER_DATA = b"#cloud-config\n\x00\xff binary \r\n"
MAC = "02:00:00:00:00:01"
TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"

FULL = InstanceMetadata(instance_id="i-00112233445566778", public_key=KEY, user_data=USER_DATA)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[MetadataServer]:
    with MetadataServer(FULL, clock=clock) as it:
        yield it


def ask(
    server: MetadataServer, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def token(server: MetadataServer, seconds: int = 60) -> str:
    status, body, _ = ask(server, "PUT", "/latest/api/token", {TTL: str(seconds)})
    assert status == 200
    return body.decode()


def get(server: MetadataServer, path: str) -> tuple[int, bytes]:
    return ask(server, "GET", path, {TOKEN: token(server)})[:2]


def raw(server: MetadataServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Tokens


@pytest.mark.parametrize("seconds", [1, 60, MAX_TOKEN_SECONDS])
def test_token_is_given_with_its_life(server: MetadataServer, seconds: int) -> None:
    status, body, headers = ask(server, "PUT", "/latest/api/token", {TTL: str(seconds)})
    assert (status, headers[TTL]) == (200, str(seconds))
    assert len(body) >= 40


@pytest.mark.parametrize(
    "seconds", ["", "0", "-1", "21601", "+60", "6_0", "1.5", "sixty", "0x10", "٦٠", "9" * 4500]
)
def test_token_life_out_of_range_is_refused(server: MetadataServer, seconds: str) -> None:
    request = f"PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n{TTL}: {seconds}\r\n\r\n"
    assert raw(server, request.encode()).startswith(b"HTTP/1.1 400 ")


def test_token_without_a_life_is_refused(server: MetadataServer) -> None:
    assert ask(server, "PUT", "/latest/api/token")[0] == 400


def test_token_is_not_given_through_a_proxy(server: MetadataServer) -> None:
    headers = {TTL: "60", "x-FORWARDED-for": "10.0.0.1"}
    status, body, _ = ask(server, "PUT", "/latest/api/token", headers)
    assert status == 403
    assert b"403" in body


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS", "FROBNICATE"])
def test_token_is_not_given_to_another_method(server: MetadataServer, method: str) -> None:
    status, body, headers = ask(server, method, "/latest/api/token", {TTL: "60"})
    assert status == 405
    assert headers["Allow"]
    assert bool(body) == (method != "HEAD")


def test_token_is_not_given_at_another_path(server: MetadataServer) -> None:
    assert ask(server, "PUT", "/latest/meta-data/", {TTL: "60"})[0] == 405


def test_headers_are_not_case_sensitive(server: MetadataServer) -> None:
    status, body, _ = ask(server, "PUT", "/latest/api/token", {TTL.upper(): "60"})
    assert status == 200
    assert ask(server, "GET", "/latest/meta-data/", {TOKEN.upper(): body.decode()})[0] == 200


# Version 1 is refused, as with HttpTokens=required


@pytest.mark.parametrize(
    "path",
    ["/", "/latest/", "/latest/meta-data/instance-id", "/latest/user-data", "/latest/nothing",
     "/latest/dynamic/instance-identity/document"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_nothing_is_told_without_a_token(server: MetadataServer, method: str, path: str) -> None:
    status, body, _ = ask(server, method, path)
    assert status == 401
    assert b"i-0011" not in body


def test_an_unknown_token_is_refused(server: MetadataServer) -> None:
    token(server)
    for wrong in ("", "no", "A" * 56):
        assert ask(server, "GET", "/latest/meta-data/", {TOKEN: wrong})[0] == 401


def test_a_token_of_another_instance_is_refused(server: MetadataServer) -> None:
    with MetadataServer(FULL) as other:
        assert ask(server, "GET", "/latest/meta-data/", {TOKEN: token(other)})[0] == 401


def test_a_token_expires(server: MetadataServer, clock: Clock) -> None:
    good = {TOKEN: token(server, 60)}
    clock.now += 59.9
    assert ask(server, "GET", "/latest/meta-data/", good)[0] == 200
    clock.now += 0.1
    assert ask(server, "GET", "/latest/meta-data/", good)[0] == 401


# The tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("instance-id", b"i-00112233445566778"),
        ("ami-id", b"ami-0123456789abcdef0"),
        ("instance-type", b"m6i.large"),
        ("hostname", b"ip-169-254-169-20.ec2.internal"),
        ("local-hostname", b"ip-169-254-169-20.ec2.internal"),
        ("local-ipv4", b"169.254.169.20"),
        ("mac", MAC.encode()),
        ("placement/availability-zone", b"us-east-1a"),
        ("placement/region", b"us-east-1"),
        ("security-groups", b"default"),
        ("services/domain", b"amazonaws.com"),
        ("public-keys/", b"0=ami-builder"),
        ("public-keys", b"0=ami-builder"),
        ("public-keys/0/", b"openssh-key"),
        ("public-keys/0/openssh-key", KEY.encode() + b"\n"),
        (f"network/interfaces/macs/{MAC}/device-number", b"0"),
        (f"network/interfaces/macs/{MAC}/local-ipv4s", b"169.254.169.20"),
        (f"network/interfaces/macs/{MAC}/subnet-ipv4-cidr-block", b"169.254.169.0/24"),
    ],
)
@pytest.mark.parametrize("version", ["latest", "2021-03-23", "2009-04-04"])
def test_metadata(server: MetadataServer, version: str, path: str, value: bytes) -> None:
    assert get(server, f"/{version}/meta-data/{path}") == (200, value)


def test_listings(server: MetadataServer) -> None:
    versions = get(server, "/")[1].decode().split("\n")
    assert {"1.0", "2009-04-04", "2021-03-23", "latest"} <= set(versions)
    assert get(server, "/latest") == get(server, "/latest/") == (200, b"dynamic\nmeta-data\nuser-data")
    top = get(server, "/latest/meta-data/")[1].decode().split("\n")
    assert {"ami-id", "instance-id", "network/", "placement/", "public-keys/", "services/"} <= set(top)
    assert top == sorted(top)
    assert get(server, "/latest/meta-data/network/interfaces/macs/") == (200, f"{MAC}/".encode())
    assert get(server, "/latest/dynamic/") == (200, b"instance-identity/")


def test_every_listed_page_exists(server: MetadataServer) -> None:
    headers = {TOKEN: token(server)}

    def walk(folder: str) -> int:
        status, body, _ = ask(server, "GET", folder, headers)
        assert status == 200
        # `0=name` is how keys are listed; their folder is the number.
        names = [name.partition("=")[0] + "/" * ("=" in name) for name in body.decode().split("\n")]
        for name in names:
            assert ask(server, "GET", folder + name, headers)[0] == 200, folder + name
        return len(names) + sum(walk(folder + name) for name in names if name.endswith("/"))

    assert walk("/latest/meta-data/") > 30


@pytest.mark.parametrize("folder", ["dynamic/instance-identity", "dynamic/instance-identity/", "placement"])
def test_folders_answer_with_and_without_their_slash(server: MetadataServer, folder: str) -> None:
    path = folder if folder.startswith("dynamic") else f"meta-data/{folder}"
    assert get(server, f"/2021-03-23/{path}")[0] == 200


def test_identity_document(server: MetadataServer) -> None:
    status, body = get(server, "/latest/dynamic/instance-identity/document")
    document = json.loads(body)
    assert status == 200
    assert document["instanceId"] == "i-00112233445566778"
    assert (document["region"], document["availabilityZone"]) == ("us-east-1", "us-east-1a")


def test_user_data_is_exact(server: MetadataServer) -> None:
    status, body, headers = ask(server, "GET", "/latest/user-data", {TOKEN: token(server)})
    assert (status, body) == (200, USER_DATA)
    assert headers["Content-Type"] == "application/octet-stream"


def test_head_tells_the_length_alone(server: MetadataServer) -> None:
    status, body, headers = ask(server, "HEAD", "/latest/user-data", {TOKEN: token(server)})
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(USER_DATA)))


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/2021-03-24/meta-data/", "/latest/meta-data/nothing", "/latest/meta-data/tags/instance",
     "/latest/meta-data/iam/security-credentials/", "/latest/meta-data/instance-id/",
     "/latest/meta-data/instance", "/latest/meta-data/instance-id/more", "/latest/meta-data/../user-data",
     "/latest/api", "//["],
)  # fmt: skip
def test_unknown_paths_are_404(server: MetadataServer, path: str) -> None:
    assert get(server, path)[0] == 404


# What EC2 tells while the instance runs

ACTION = '{"action": "terminate", "time": "2026-08-01T08:22:00Z"}'


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spot/instance-action", ACTION),
        ("spot/termination-time", "2026-08-01T08:22:00Z"),
        ("events/recommendations/rebalance", '{"noticeTime": "2026-08-01T08:20:00Z"}'),
        ("autoscaling/target-lifecycle-state", "Terminated"),
        ("iam/security-credentials/dask", '{"Code": "Success"}'),
        ("tags/instance/aws:autoscaling:groupName", "workers"),
    ],
)
def test_a_value_is_there_while_it_is_announced(server: MetadataServer, path: str, value: str) -> None:
    folder, _, name = f"/latest/meta-data/{path}".rpartition("/")
    assert get(server, f"{folder}/{name}")[0] == get(server, f"{folder}/")[0] == 404
    before = get(server, "/latest/meta-data/")
    server.tree.announce(path, value)
    assert get(server, f"{folder}/{name}") == (200, value.encode())
    assert get(server, f"{folder}/") == (200, name.encode())
    assert f"{path.partition('/')[0]}/" in get(server, "/latest/meta-data/")[1].decode().split("\n")
    server.tree.announce(path, "changed")
    assert get(server, f"{folder}/{name}") == (200, b"changed")
    server.tree.withdraw(path)
    assert get(server, f"{folder}/{name}")[0] == get(server, f"{folder}/")[0] == 404
    assert get(server, "/latest/meta-data/") == before


def test_what_was_not_announced_cannot_be_withdrawn(server: MetadataServer) -> None:
    with pytest.raises(KeyError):
        server.tree.withdraw("spot/instance-action")


@pytest.mark.parametrize("user_data", [None, b""])
def test_what_an_instance_does_not_have_is_404(user_data: bytes | None) -> None:
    with MetadataServer(InstanceMetadata(instance_id="i-0", user_data=user_data)) as bare:
        assert get(bare, "/latest/user-data")[0] == 404
        assert get(bare, "/latest/meta-data/public-keys/")[0] == 404
        assert get(bare, "/latest/") == (200, b"dynamic\nmeta-data")


def test_other_regions_have_longer_names() -> None:
    metadata = InstanceMetadata(instance_id="i-0", region="eu-west-1", local_ipv4="10.0.0.9")
    assert metadata.hostname == "ip-10-0-0-9.eu-west-1.compute.internal"


def test_user_data_has_the_bound_of_ec2() -> None:
    InstanceMetadata(instance_id="i-0", user_data=b"x" * MAX_USER_DATA)
    with pytest.raises(UsageError, match="16385 bytes"):
        InstanceMetadata(instance_id="i-0", user_data=b"x" * (MAX_USER_DATA + 1))


# Odd requests


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"GET /latest/ HTTP/9.9\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /latest/ HTTP/1.0\r\n\r\n", b"401"),
    ],
)
def test_requests_that_no_client_makes(server: MetadataServer, request_: bytes, status: bytes) -> None:
    assert raw(server, request_).split(b" ")[1] == status


def test_a_client_that_hangs_up_leaves_no_trace(
    server: MetadataServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for data in (b"", b"GET", b"PUT /latest/api/token HTTP/1.1\r\n"):
        raw(server, data)
    assert get(server, "/latest/meta-data/ami-id")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_it_listens_on_loopback_only_and_stops() -> None:
    with MetadataServer(FULL) as server:
        port = server.port
        get(server, "/")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=60)

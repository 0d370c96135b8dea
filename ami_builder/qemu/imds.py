"""An emulation of EC2's instance metadata service, version 2 only, on a loopback port.

It gives the same answers as EC2 to an instance launched with `HttpTokens=required`, and refuses the same
requests: an image that finds its key and user data here finds them on an instance. It does not emulate:

- the hop limit (the address is reached through QEMU's user network, so there are no hops to count);
- throttling, and the 503 that EC2 answers while an instance is being set up;
- signatures of the identity document (pkcs7, rsa2048, signature are absent);
- older versions of the tree: every version shows the newest;
- IPv6, ENI secondary addresses, elastic IPs and public names.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from ami_builder.core.errors import UsageError
from ami_builder.core.options import Arch

MAX_USER_DATA = 16 * 1024
"""The maximum size of user data in bytes; EC2's documented quota."""
MAX_TOKEN_SECONDS = 21_600
"""The maximum lifetime of a token; EC2's documented limit."""

VERSIONS = (
    "1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
    "2009-04-04", "2011-01-01", "2011-05-01", "2012-01-12", "2014-02-25", "2014-11-05", "2015-10-20",
    "2016-04-19", "2016-06-30", "2016-09-02", "2018-03-28", "2018-08-17", "2018-09-24", "2019-10-01",
    "2020-10-27", "2021-01-03", "2021-03-23", "2021-07-15", "2022-09-24", "2024-04-11", "latest",
)  # fmt: skip

_SOCKET_SECONDS = 30.0
_STOP_SECONDS = 0.02


def new_instance_id() -> str:
    """Return a new instance id, so that cloud-init sees a new instance."""
    return f"i-0{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceMetadata:
    """The metadata of one instance. Raises UsageError for user data that EC2 would refuse."""

    instance_id: str
    public_key: str | None = None
    """One line of an authorized_keys file; None for an instance launched without a key pair."""
    user_data: bytes | None = None
    key_name: str = "ami-builder"
    ami_id: str = "ami-0123456789abcdef0"
    root_device: str = "/dev/sda1"
    """The name that the AMI has for it; the guest sees an NVMe disk."""
    instance_type: str = "m6i.large"
    region: str = "us-east-1"
    zone: str = "a"
    local_ipv4: str = "169.254.169.20"
    subnet: str = "169.254.169.0/24"
    mac: str = "02:00:00:00:00:01"
    account: str = "123456789012"
    arch: Arch = Arch.AMD64

    def __post_init__(self) -> None:
        size = len(self.user_data or b"")
        if size > MAX_USER_DATA:
            raise UsageError(
                f"the user data has {size} bytes, EC2 takes at most {MAX_USER_DATA}",
                hint="fetch the larger part from the machine, or compress it (cloud-init reads gzip)",
            )

    @property
    def hostname(self) -> str:
        """The private DNS name that EC2 makes of the address."""
        domain = "ec2.internal" if self.region == "us-east-1" else f"{self.region}.compute.internal"
        return f"ip-{self.local_ipv4.replace('.', '-')}.{domain}"


class MetadataTree:
    """The pages of one instance.

    Values that EC2 sets while an instance runs are announced, and can be withdrawn.
    """

    def __init__(self, metadata: InstanceMetadata) -> None:
        self._metadata = metadata
        self._announced: dict[str, str] = {}
        self._lock = threading.Lock()
        self._pages = _pages(metadata, {})

    def announce(self, path: str, value: str) -> None:
        """Set a value below meta-data/ that instances have only at times, such as spot/instance-action."""
        self._change(path, value)

    def withdraw(self, path: str) -> None:
        """Remove an announced value. Raises KeyError if there is none."""
        self._change(path, None)

    def _change(self, path: str, value: str | None) -> None:
        with self._lock:
            if value is None:
                del self._announced[path]
            else:
                self._announced[path] = value
            self._pages = _pages(self._metadata, self._announced)

    def lookup(self, path: str) -> bytes | None:
        """Return the content of `path`: the bytes of a leaf, the listing of a folder, or None."""
        pages = self._pages
        parts = [part for part in path.split("/") if part]
        if not parts:
            return "\n".join(VERSIONS).encode()
        if parts[0] not in VERSIONS:
            return None
        key = "/".join(parts[1:])
        if key in pages and not path.endswith("/"):
            return pages[key]
        return pages.get(f"{key}/")


class MetadataServer:
    """Serves one instance's metadata on a free port of 127.0.0.1 while the context lasts."""

    def __init__(self, metadata: InstanceMetadata, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.tree = MetadataTree(metadata)
        self._clock = clock
        self._tokens: dict[str, float] = {}
        self._lock = threading.Lock()
        self._running = ExitStack()
        self._port = 0

    def __enter__(self) -> MetadataServer:
        with ExitStack() as stack:
            self._port = stack.enter_context(serving(lambda _: self))
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    @property
    def port(self) -> int:
        """The loopback port that QEMU's forwarder connects to."""
        assert self._port, "the server runs only inside its context"
        return self._port

    def new_token(self, seconds: int) -> str:
        """Return a token that is valid for `seconds`."""
        token = secrets.token_urlsafe(40) + "=="
        with self._lock:
            self._tokens[token] = self._clock() + seconds
        return token

    def knows(self, token: str | None) -> bool:
        """Return whether this server issued `token`, and it has not expired."""
        with self._lock:
            expires = self._tokens.get(token or "")
        return expires is not None and self._clock() < expires


@contextmanager
def serving(
    find: Callable[[str], MetadataServer | None], *, address: str = "127.0.0.1", port: int = 0
) -> Iterator[int]:
    """Answer requests while the context lasts, each by what `find` returns for the client's address.

    Yields the port. A client that `find` returns None for gets 404, as from no instance.
    """
    handler = type("_BoundHandler", (_Handler,), {"find": staticmethod(find)})
    server = _Server((address, port), handler)
    threading.Thread(target=server.serve_forever, args=(_STOP_SECONDS,), name="imds", daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Print no traceback when a guest hangs up in the middle of an answer, as in a reboot."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    find: Callable[[str], MetadataServer | None]
    service: MetadataServer
    protocol_version = "HTTP/1.1"
    # For request lines without a version; 0.9 would be answered without a status.
    default_request_version = "HTTP/1.0"
    server_version = "EC2ws"
    sys_version = ""
    timeout = _SOCKET_SECONDS

    def parse_request(self) -> bool:
        """Find the instance that asks, beside what the base class does."""
        if not super().parse_request():
            return False
        found = type(self).find(self.client_address[0])
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return False
        self.service = found
        return True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.rstrip("/") == "/latest/api/token":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, allow="OPTIONS, PUT")
        elif not self.service.knows(self.headers.get("X-aws-ec2-metadata-token")):
            self._refuse(HTTPStatus.UNAUTHORIZED)
        elif (body := self.service.tree.lookup(path)) is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            binary = path.rstrip("/").endswith("/user-data")
            self._answer(HTTPStatus.OK, body, "application/octet-stream" if binary else "text/plain")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        if self.path.partition("?")[0] != "/latest/api/token":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, allow="GET, HEAD")
            return
        if "X-Forwarded-For" in self.headers:
            # A proxy that was tricked into the request sends this header; EC2 gives it no token.
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        wanted = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").strip()
        # isdecimal alone takes digits of other scripts, and int() takes "+5" and "1_0".
        seconds = int(wanted) if wanted.isascii() and wanted.isdecimal() and len(wanted) < 9 else 0
        if not 1 <= seconds <= MAX_TOKEN_SECONDS:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        token = self.service.new_token(seconds).encode()
        extra = {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": str(seconds)}
        self._answer(HTTPStatus.OK, token, "text/plain", extra)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the base class could not parse; a method without a handler is 405 at EC2, not 501."""
        del message, explain
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, allow="GET, HEAD")
        else:
            self._refuse(HTTPStatus(code))

    def _refuse(self, status: HTTPStatus, *, allow: str | None = None) -> None:
        body = (
            '<?xml version="1.0" encoding="iso-8859-1"?>\n'
            f"<html><head><title>{status.value} - {status.phrase}</title></head>"
            f"<body><h1>{status.value} - {status.phrase}</h1></body></html>\n"
        )
        self._answer(status, body.encode(), "text/html", {"Allow": allow} if allow else {})

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str, extra: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the standard library from writing to stderr."""


def _pages(it: InstanceMetadata, announced: Mapping[str, str]) -> dict[str, bytes]:
    """Return every page below a version: leaves as they are sent, folders (with a slash) as listings."""
    zone = it.region + it.zone
    document = {
        "accountId": it.account,
        "architecture": it.arch.ec2,
        "availabilityZone": zone,
        "imageId": it.ami_id,
        "instanceId": it.instance_id,
        "instanceType": it.instance_type,
        "pendingTime": "2026-01-01T00:00:00Z",
        "privateIp": it.local_ipv4,
        "region": it.region,
        "version": "2017-09-30",
    }
    interface = {
        "device-number": "0",
        "interface-id": f"eni-{it.instance_id[2:]}",
        "local-hostname": it.hostname,
        "local-ipv4s": it.local_ipv4,
        "mac": it.mac,
        "owner-id": it.account,
        "security-group-ids": "sg-0123456789abcdef0",
        "security-groups": "default",
        "subnet-id": f"subnet-{it.instance_id[2:]}",
        "subnet-ipv4-cidr-block": it.subnet,
        "vpc-id": "vpc-0123456789abcdef0",
        "vpc-ipv4-cidr-block": it.subnet,
        "vpc-ipv4-cidr-blocks": it.subnet,
    }
    leaves = {
        "dynamic/instance-identity/document": json.dumps(document, indent=2),
        "meta-data/ami-id": it.ami_id,
        "meta-data/ami-launch-index": "0",
        "meta-data/ami-manifest-path": "(unknown)",
        "meta-data/block-device-mapping/ami": it.root_device,
        "meta-data/block-device-mapping/root": it.root_device,
        "meta-data/hostname": it.hostname,
        "meta-data/instance-action": "none",
        "meta-data/instance-id": it.instance_id,
        "meta-data/instance-life-cycle": "on-demand",
        "meta-data/instance-type": it.instance_type,
        "meta-data/local-hostname": it.hostname,
        "meta-data/local-ipv4": it.local_ipv4,
        "meta-data/mac": it.mac,
        **{f"meta-data/network/interfaces/macs/{it.mac}/{name}": value for name, value in interface.items()},
        "meta-data/placement/availability-zone": zone,
        "meta-data/placement/region": it.region,
        "meta-data/profile": "default-hvm",
        "meta-data/reservation-id": f"r-{it.instance_id[2:]}",
        "meta-data/security-groups": "default",
        "meta-data/services/domain": "amazonaws.com",
        "meta-data/services/partition": "aws",
        "meta-data/system": "nitro",
        **{f"meta-data/{path}": value for path, value in announced.items()},
    }
    if it.public_key is not None:
        leaves["meta-data/public-keys/0/openssh-key"] = it.public_key.strip() + "\n"
    pages = {path: value.encode() for path, value in leaves.items()}
    if it.user_data:
        pages["user-data"] = it.user_data
    pages |= _listings(pages)
    # Two of EC2's listings differ from the rest: keys are numbered and named, and a version's has no slashes.
    if it.public_key is not None:
        pages["meta-data/public-keys/"] = f"0={it.key_name}".encode()
    pages["/"] = pages["/"].replace(b"/", b"")
    return pages


def _listings(leaves: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return folder -> its entries, one a line and sorted, sub-folders with a trailing slash."""
    entries: dict[str, set[str]] = {}
    for leaf in leaves:
        parts = leaf.split("/")
        for depth, name in enumerate(parts):
            folder = "/".join(parts[:depth]) + "/"
            entries.setdefault(folder, set()).add(name if depth == len(parts) - 1 else f"{name}/")
    return {folder: "\n".join(sorted(names)).encode() for folder, names in entries.items()}

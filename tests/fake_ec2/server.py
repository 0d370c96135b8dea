"""EC2 on loopback: moto's server behind a layer that adds what moto lacks and this project needs.

Tests use it as the fixture `cloud` (conftest.py). To use it by hand, set AWS_ENDPOINT_URL to its address:

    python -m tests.fake_ec2.server --port 5555 --instances base.qcow2

It does not emulate:

- signatures: any secret is accepted with any access key; there is one account;
- durations: everything but VMs changes its state at once, except new images
  (CloudOptions.image_describes, image_seconds); snapshots are complete as soon as they exist;
- eventual consistency, except for new ids that describes do not find yet (CloudOptions.hidden_describes);
- quotas: GetServiceQuota has CloudOptions.vcpu_quotas, and launch_refusal refuses launches, but nothing
  is counted; prices, except those in CloudOptions.region_prices;
- networks: a security group only decides whether port 22 of an instance is reachable from this host;
  routes and gateways are described but lead nowhere, and every address is one of this host's loopback, or
  of the network in network.py;
- volumes without an instance, and snapshots of those that are no root disk; KMS keys, which are only names;
- interruptions of spot instances, Session Manager's tunnels, instance refresh, fleets;
- permissions, except of access keys given to `enforce`, and then as guard.py and policy.py document.

behaviours.toml cites what it does emulate where AWS publishes no data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from moto.moto_api._internal.models import moto_api_backend
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from tests.fake_ec2.api_call import ACCOUNT, ApiCall
from tests.fake_ec2.cloud_state import CloudOptions, CloudState, Hypervisor, base_ami
from tests.fake_ec2.shim import Shim

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tests.fake_ec2.faults import Faults
    from tests.fake_ec2.guard import Enforced
    from tests.fake_ec2.hypervisor import VmHypervisor
    from tests.fake_ec2.policy import Document

ACCESS_KEY = "AKIATESTSTESTSTESTS0"
"""The access key that may do everything; 20 characters, as moto expects."""
REGION = "us-east-1"


class Cloud:
    """The server, running on 127.0.0.1 while the context lasts, and what a test asks it and sets."""

    def __init__(self, *, port: int = 0) -> None:
        self._port = port
        self._shim = Shim()
        self._shim.on_reset = self.reset
        self._session = boto3.session.Session()
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Cloud:
        self._server = make_server("127.0.0.1", self._port, self._shim, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="cloud", daemon=True
        )
        self._thread.start()
        self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The endpoint of every service."""
        assert self._server is not None, "the server runs only inside its context"
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, access_key: str = ACCESS_KEY, region: str = REGION) -> dict[str, str]:
        """Return the variables that make boto3, the AWS CLI and Packer talk to this cloud alone."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": region,
            "AWS_DEFAULT_REGION": region,
            "AWS_EC2_METADATA_DISABLED": "true",
            # Packer's; its own five seconds are for a cloud that takes minutes.
            "AWS_POLL_DELAY_SECONDS": "1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self, service: str = "ec2", *, access_key: str = ACCESS_KEY, region: str = REGION) -> Any:
        """Return a boto3 client of this cloud that never retries."""
        once = Config(retries={"mode": "standard", "total_max_attempts": 1}, proxies={}, read_timeout=60)
        settings = {"aws_access_key_id": access_key, "aws_secret_access_key": "secret", "region_name": region}
        session: Any = self._session
        with self._shim.lock:
            return session.client(service, endpoint_url=self.url, config=once, **settings)

    def reset(self) -> None:
        """Empty the account, and take back faults, options, permissions and the log of calls."""
        machines = self._shim.state.machines
        if machines is not None:
            machines.clear()
        with self._shim.lock:
            moto_api_backend.reset()
            self._shim.state = CloudState()
            self._shim.state.machines = machines
            self._shim.faults.clear()
            self._shim.guard.clear()
            self._shim.calls = []

    @property
    def options(self) -> CloudOptions:
        """How the cloud behaves; set what the test needs."""
        return self._shim.state.options

    @property
    def faults(self) -> Faults:
        """Faults on purpose."""
        return self._shim.faults

    @property
    def machines(self) -> Hypervisor | None:
        """What runs the instances; None while they are rows only."""
        return self._shim.state.machines

    @machines.setter
    def machines(self, machines: Hypervisor | None) -> None:
        if machines is not None:
            machines.lock = self._shim.lock
        self._shim.state.machines = machines

    @property
    def calls(self) -> tuple[ApiCall, ...]:
        """All calls since the last reset."""
        with self._shim.lock:
            return tuple(self._shim.calls)

    def count(self, action: str, *, packer: bool | None = None) -> int:
        """Return how often an action was called, refused or not; by Packer alone, or by all others alone."""
        return sum(call.action == action and packer in (call.packer, None) for call in self.calls)

    def backend(self, region: str = REGION) -> Any:
        """Return moto's EC2 backend of a region, to look into or to fill by hand."""
        with self._shim.lock:
            return self._shim.state.backend(ACCOUNT, region)

    def base_ami(self, region: str = REGION) -> str:
        """Return the id of the newest Debian 13 image for amd64."""
        return base_ami(self.backend(region))

    def enforce(
        self,
        document: Document,
        access_key: str,
        *,
        boundary: Document | None = None,
        controls: Sequence[Document] = (),
    ) -> Enforced:
        """Allow calls signed with `access_key` only what the policies allow, and return what is used of them.

        `boundary` is a permissions boundary, `controls` are an organization's service control policies.
        """
        return self._shim.guard.enforce(document, access_key, boundary=boundary, controls=controls)

    def identify(self, access_key: str, principal: str, *, path: str = "") -> None:
        """Let an access key belong to a user or an assumed role, by its ARN.

        `path` is that of the role, such as `aws-reserved/`, which an assumed role's ARN doesn't have.
        """
        self._shim.guard.principals[access_key] = principal
        if path:
            self._shim.guard.role_paths[principal.split("/")[1]] = path

    def hide(self, *ids: str) -> None:
        """Let as many calls as `hidden_describes` says not find these."""
        with self._shim.lock:
            self._shim.state.made(*ids)

    def metadata(self, instance_id: str) -> dict[str, str]:
        """Return what an instance finds in its metadata beside what it was launched with, by path."""
        with self._shim.lock:
            return dict(self._shim.state.announced.get(instance_id, {}))

    def left(self, region: str = REGION) -> dict[str, list[str]]:
        """Return what the account has beside what it began with: kind -> ids, empty kinds left out."""
        backend = self.backend(region)
        found = {
            "instance": [i.id for i in backend.all_instances() if i.state != "terminated"],
            "image": [i.id for i in backend.amis.values() if i.owner_id == ACCOUNT],
            "snapshot": [s.id for s in backend.snapshots.values() if s.owner_id == ACCOUNT],
            "launch-template": list(backend.launch_templates),
            "volume": list(backend.volumes),
            "security-group": [
                g.id for groups in backend.groups.values() for g in groups.values() if g.name != "default"
            ],
            "key-pair": list(backend.key_pairs),
        }
        return {kind: ids for kind, ids in found.items() if ids}


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Keep the log of calls the only one."""


def main() -> None:
    """Serve until Ctrl-C, and print the variables that point a shell at it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fake_ec2.server", description="An EC2 on loopback."
    )
    parser.add_argument("--port", type=int, default=5555)
    parser.add_argument("--instances", type=Path, metavar="DISK", help="boot a machine from it per instance")
    parser.add_argument(
        "--memory", action="append", default=[], metavar="TYPE=MIB", help="of an instance type"
    )
    parser.add_argument("--nat", action="store_true", help="let instances reach the network")
    asked = parser.parse_args()
    with ExitStack() as owned:
        cloud = owned.enter_context(Cloud(port=asked.port))
        if asked.instances is not None:
            owned.callback(setattr, cloud, "machines", None)
            cloud.machines = owned.enter_context(_machines(asked))
        for name, value in cloud.environment().items():
            print(f"export {name}={value}")
        print(f"# ssh reaches instances at port {cloud.machines.port}" if cloud.machines else "", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _machines(asked: argparse.Namespace) -> VmHypervisor:
    from ami_builder.core.options import Network
    from ami_builder.qemu.accelerator import choose_accelerator
    from tests.fake_ec2.hypervisor import VmHypervisor

    directory = Path(tempfile.mkdtemp(prefix="cloud-"))
    accelerator, reason = choose_accelerator(
        asked.instances, cache=directory / "accelerator.json", directory=directory
    )
    print(f"# {reason}", flush=True)
    return VmHypervisor(
        base=asked.instances,
        directory=directory,
        accelerator=accelerator,
        memory={kind: int(mib) for kind, _, mib in (each.partition("=") for each in asked.memory)},
        network=Network.NAT if asked.nat else Network.ISOLATED,
    )


if __name__ == "__main__":
    main()

"""A network that instances share: a bridge of this host with DHCP and metadata, as a VPC has them.

It takes 172.31.0.0/16 and 169.254.169.254, so it is made in a network namespace of its own (`unshare --net`),
where the emulated EC2 and its clients run too. They reach instances directly; security groups have no effect.
Names of instances resolve, others are refused at once, and nothing leads outside.
"""

from __future__ import annotations

import ipaddress
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ami_builder.qemu import imds
from ami_builder.qemu.hardware import Tap
from ami_builder.system import processes

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

VPC = ipaddress.ip_network("172.31.0.0/16")
"""The addresses of moto's default VPC, as EC2's."""
GATEWAY = "172.31.0.1"
METADATA = "169.254.169.254"
_BRIDGE = "instances"


class InstanceNetwork:
    """The bridge and its services, while the context lasts; needs root in a network namespace."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._leases = self._directory / "hosts"
        self._services: dict[str, imds.MetadataServer] = {}
        self._owned = ExitStack()

    def __enter__(self) -> InstanceNetwork:
        self._leases.mkdir(parents=True)
        with ExitStack() as owned:
            _ip("link", "set", "lo", "up")
            _ip("link", "add", _BRIDGE, "type", "bridge")
            owned.callback(_ip, "link", "delete", _BRIDGE)
            _ip("address", "add", f"{GATEWAY}/{VPC.prefixlen}", "dev", _BRIDGE)
            _ip("address", "add", f"{METADATA}/32", "dev", _BRIDGE)
            _ip("link", "set", _BRIDGE, "up")
            owned.enter_context(imds.serving(self._services.get, address=METADATA, port=80))
            log = owned.enter_context((self._directory / "dnsmasq.log").open("w"))
            owned.enter_context(processes.running(self._dnsmasq(), stdout=log.fileno()))
            self._owned = owned.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owned.close()

    def connect(self, metadata: imds.MetadataServer, address: str) -> Tap:
        """Return a new device for the instance that has this address, and serve its metadata there."""
        number = int(ipaddress.IPv4Address(address))
        tap = Tap(name=f"tap{number:08x}", mac=mac_of(address), address=address)
        _ip("tuntap", "add", tap.name, "mode", "tap")
        _ip("link", "set", tap.name, "master", _BRIDGE, "up")
        self._services[address] = metadata
        # dnsmasq reads new files by itself.
        (self._leases / address).write_text(f"{tap.mac},{address}\n")
        return tap

    def disconnect(self, tap: Tap) -> None:
        """Remove the device of an instance that has ended."""
        _ip("link", "delete", tap.name)
        del self._services[tap.address]
        (self._leases / tap.address).unlink()

    def _dnsmasq(self) -> list[str]:
        leases = self._directory / "leases"
        return [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=root"),
            *("--pid-file=", "--log-facility=-", "--no-hosts", "--no-resolv", "--no-ping"),
            *(f"--interface={_BRIDGE}", "--except-interface=lo", "--bind-interfaces"),
            *("--dhcp-authoritative", f"--dhcp-leasefile={leases}", f"--dhcp-hostsdir={self._leases}"),
            f"--dhcp-range={VPC.network_address},static,{VPC.netmask},infinite",
            # The names that EC2 gives its instances, by their addresses.
            f"--synth-domain=ec2.internal,{VPC},ip-",
        ]


def placed(address: str) -> dict[str, str]:
    """Return what the metadata of the instance at this address say about its network."""
    return {"local_ipv4": address, "subnet": str(VPC), "mac": mac_of(address)}


def mac_of(address: str) -> str:
    """Return the hardware address of the instance that has this address."""
    return ":".join(f"{part:02x}" for part in (2, 0, *ipaddress.IPv4Address(address).packed))


def _ip(*arguments: str) -> None:
    processes.output(["ip", *arguments], what=f"ip {' '.join(arguments)}")

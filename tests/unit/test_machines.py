"""What verification asks of a VM here and of an instance: reboots, CPU seconds, the process that runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from ami_builder.aws.machine import Ec2Machine
from ami_builder.aws.session import Account
from ami_builder.core.errors import TimedOut
from ami_builder.core.records import Endpoint
from ami_builder.qemu import target
from ami_builder.qemu.hardware import Accelerator
from ami_builder.qemu.target import QemuMachine
from ami_builder.state.ledger import Ledger
from ami_builder.system import host_load, ssh
from ami_builder.system.processes import Completed
from tests.sample_image import GIB, image

TCG, KVM = Accelerator.TCG, Accelerator.KVM


class Host:
    """QEMU's processes here, and the CPU time that each has used."""

    def __init__(self) -> None:
        self.used: dict[int, float] = {}
        self.events: list[str] = []

    def cpu_seconds(self, pid: int) -> float | None:
        return self.used.get(pid)


class Qemu:
    """A VM, of which only the process is there."""

    def __init__(self, of: Host, accelerator: Accelerator) -> None:
        self.host, self.accelerator, self.pid = of, accelerator, 100
        of.used[self.pid] = 0.0

    def __enter__(self) -> Endpoint:
        return Endpoint(address="127.0.0.1", port=22, user="admin", console_log=Path("console.log"))

    def __exit__(self, *_: object) -> None: ...

    def expect_reboot(self) -> None:
        self.host.events.append("expected")

    def start_again(self, timeout: float) -> None:
        self.host.events.append(f"started again within {timeout:.0f} s")
        if self.accelerator is TCG:
            del self.host.used[self.pid]
            self.pid += 1
            self.host.used[self.pid] = 0.0


class Session:
    """A login; a reboot of what it is on takes 20 CPU seconds to go down and 80 to come up."""

    def __init__(self, of: Host, machine: Callable[[], int]) -> None:
        self.host, self.machine = of, machine
        self.answer = Completed(status=0, stdout="", stderr="")

    def reboot(
        self, timeout: float, alive: Callable[[], None], went_down: Callable[[float], None] | None = None
    ) -> None:
        self.host.events.append(f"reboot within {timeout:.0f} s")
        alive()
        if went_down is not None:
            self.host.used[self.machine()] += 20
            went_down(timeout - 5)
            self.host.used[self.machine()] += 80

    def run(self, command: str, *, check: bool) -> Completed:
        assert not check
        self.host.events.append(command)
        return self.answer


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Host:
    it = Host()
    monkeypatch.setattr(host_load, "cpu_seconds", it.cpu_seconds)
    return it


@pytest.fixture
def local(
    here: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Accelerator], tuple[QemuMachine, ssh.Session]]:
    def start(accelerator: Accelerator) -> tuple[QemuMachine, ssh.Session]:
        monkeypatch.setattr(target, "VirtualMachine", lambda **_: Qemu(here, accelerator))
        machine = QemuMachine(image=image(), disk=tmp_path / "disk", accelerator=accelerator, memory=2 * GIB)
        with ExitStack() as stack:
            machine.start(stack, tmp_path, "#cloud-config\n", "ssh-ed25519 AAAA x")
        return machine, cast(ssh.Session, Session(here, lambda: machine.emulator))

    return start


Local = Callable[[Accelerator], tuple[QemuMachine, ssh.Session]]


@pytest.mark.parametrize("accelerator", [TCG, KVM])
def test_a_boots_cpu_seconds_are_those_of_its_process(
    local: Local, here: Host, accelerator: Accelerator
) -> None:
    machine, session = local(accelerator)
    here.used[machine.emulator] = 134.5
    assert machine.cpu_seconds(session) == 134.5
    here.used.clear()
    assert machine.cpu_seconds(session) is None, "it has ended"


def test_an_emulated_vm_reboots_into_a_new_process(local: Local, here: Host) -> None:
    machine, session = local(TCG)
    here.used[machine.emulator], before = 134.5, machine.emulator
    machine.reboot(session, 900, lambda: here.events.append("alive"))
    assert here.events == ["expected", "reboot within 900 s", "alive", "started again within 895 s"]
    assert machine.emulator != before
    assert machine.cpu_seconds(session) == 80


def test_the_same_process_is_counted_from_where_it_went_down(local: Local, here: Host) -> None:
    """Not from where it came up again: what that takes is what is measured."""
    machine, session = local(KVM)
    before = machine.emulator
    here.used[before] = 134.5
    for _ in range(2):
        machine.reboot(session, 900, lambda: None)
        assert machine.emulator == before
        assert machine.cpu_seconds(session) == 80


def test_a_reboot_that_fails_is_told(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, session = local(TCG)

    def late(*_: object) -> None:
        raise TimedOut("a reboot took longer than 900 s")

    monkeypatch.setattr(session, "reboot", late)
    with pytest.raises(TimedOut):
        machine.reboot(session, 900, lambda: None)


@pytest.fixture
def cloud() -> Ec2Machine:
    unused: Any = None
    return Ec2Machine(
        name="m6i.large",
        image=image(),
        ami="ami-1",
        account=cast(Account, unused),
        ledger=cast(Ledger, unused),
        group="sg-1",
        run_id="r",
        tags={},
    )


def test_an_instance_tells_its_cpu_seconds_itself(cloud: Ec2Machine, here: Host) -> None:
    session = Session(here, lambda: 0)
    # user nice system idle iowait irq softirq steal guest guest_nice
    session.answer = Completed(
        status=0, stdout="cpu  4000 100 1500 99999 777 20 80 555 333 11\n100\n", stderr=""
    )
    assert cloud.cpu_seconds(cast(ssh.Session, session)) == 57.0
    assert cloud.emulator == 0


@pytest.mark.parametrize(
    ("status", "stdout"), [(127, "cpu 1 2 3 4 5 6 7 8 9 10\n"), (0, ""), (0, "cpu 1 2 3\n100\n"), (1, "")]
)
def test_an_instance_that_does_not_tell_has_none(
    cloud: Ec2Machine, here: Host, status: int, stdout: str
) -> None:
    session = Session(here, lambda: 0)
    session.answer = Completed(status=status, stdout=stdout, stderr="")
    assert cloud.cpu_seconds(cast(ssh.Session, session)) is None


def test_an_instance_reboots_by_itself(cloud: Ec2Machine, here: Host) -> None:
    alive: list[int] = []
    cloud.reboot(cast(ssh.Session, Session(here, lambda: 0)), 900, lambda: alive.append(1))
    assert here.events == ["reboot within 900 s"]
    assert alive == [1]

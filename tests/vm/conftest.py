"""Real images on real virtual machines. One build is shared by all tests, and one booted machine by most.

Everything lives in .cache/ of the checkout, or in the folder that AMI_BUILDER_TEST_HOME names, so that a
second run finds base disk and container in the cache. Tests run in the order of the files' names.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.config import loading
from ami_builder.core.options import Network, Role
from ami_builder.core.records import CheckResult, Outcome
from ami_builder.qemu import imds
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.qemu.disks import create_overlay
from ami_builder.qemu.hardware import Accelerator
from ami_builder.qemu.machine import VirtualMachine, boot_again
from ami_builder.state.workspace import Workspace
from ami_builder.system import processes, ssh
from ami_builder.system.resources import checks_dir
from ami_builder.verify import journey, runner
from tests.saved_vm import SavedVm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.config.schema import Image

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("AMI_BUILDER_TEST_HOME", ROOT / ".cache" / "vm-tests"))
NONCE = "0123456789abcdef"
GIB = 1 << 30
DASK_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one `ami-builder` command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Its stdout as JSON."""
        return json.loads(self.stdout)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command whose workspace is the tests' own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AMI_BUILDER_")}
    return kept | {"AMI_BUILDER_HOME": str(HOME), "PYTHONPATH": str(ROOT)} | more


def ami_builder(
    *arguments: str | Path,
    timeout: float = 3000,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    module: str = "ami_builder",
) -> Answer:
    """Run the command line as a user does, and return what it did; its stderr is passed on."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment(**(env or {})),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    sys.stderr.write(done.stderr)
    return Answer(status=done.returncode, stdout=done.stdout, stderr=done.stderr)


@pytest.fixture(scope="session")
def workspace() -> Workspace:
    """The tests' workspace."""
    return Workspace.open({"AMI_BUILDER_HOME": str(HOME)})


@pytest.fixture(scope="session")
def built(pytestconfig: pytest.Config) -> Mapping[str, Any]:
    """The image of the committed configuration, baked and verified by `ami-builder build`.

    Where a tier is asked for, this is the journey: it is made though nothing that goes into it has changed.
    """
    again = ("--force",) if pytestconfig.getoption("tier") else ()
    answer = ami_builder("build", *again, "--json")
    assert answer.status == 0, answer.stderr
    found: Mapping[str, Any] = answer.json
    return found


@pytest.fixture(scope="session")
def image() -> Image:
    """The default image of the committed configuration."""
    return loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select()


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted:
    """A machine of the built image, and how to check it again and again."""

    machine: VirtualMachine
    session: ssh.Session
    context: runner.Context
    directory: Path
    metadata: imds.MetadataTree
    """What the instance is told about itself, which can change."""

    def root(self, script: str, *, check: bool = True) -> str:
        """Run a shell script as root and return its output."""
        return self.session.run(script, sudo=True, check=check, timeout=DASK_SECONDS).stdout

    def check(
        self, name: str, *, phase: str = "restart", shared: bool = True, timeout: float = DASK_SECONDS
    ) -> dict[str, CheckResult]:
        """Run the shipped checks and return their results by name."""
        config = self.session.config
        if not shared:
            # ssh uses the first value that it reads.
            own = f'ControlMaster no\nControlPath none\nInclude "{config.resolve()}"\n'
            config = self.directory / "ssh_config-unshared"
            config.write_text(own)
        results = runner.run(
            files=runner.shipped(checks_dir()),
            ssh_config=config,
            host=ssh.HOST,
            phase=phase,
            context=replace(self.context, timeout=timeout),
            directory=self.directory / name,
            timeout=timeout,
        )
        return {result.name: result for result in results}

    @contextmanager
    def forwarded(self, port: int) -> Iterator[int]:
        """Return the port of this machine that leads to one of the booted machine's."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            here: int = free.getsockname()[1]
        forward = f"127.0.0.1:{here}:127.0.0.1:{port}"
        control: list[str | Path] = ["ssh", "-F", self.session.config, "-L", forward]
        processes.output([*control, "-O", "forward", ssh.HOST])
        try:
            yield here
        finally:
            processes.output([*control, "-O", "cancel", ssh.HOST])


def red(results: Mapping[str, CheckResult]) -> dict[str, str]:
    """Return the checks that failed, with their messages."""
    return {name: r.message for name, r in results.items() if r.outcome is Outcome.FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What a VM is told about itself, and the key that logs in to it."""

    metadata: imds.InstanceMetadata
    key: Path

    @classmethod
    def new(cls, image: Image, directory: Path, user_data: bytes | None = None) -> Instance:
        """Return one that was not used before; without user data it gets what verification sends."""
        key = ssh.generate_key(directory)
        metadata = imds.InstanceMetadata(
            instance_id=imds.new_instance_id(),
            user_data=user_data or journey.user_data(image, nonce=NONCE).encode(),
            public_key=key.with_suffix(".pub").read_text().strip(),
        )
        return cls(metadata=metadata, key=key)


@contextmanager
def running(
    image: Image,
    instance: Instance,
    disk: Path,
    directory: Path,
    *,
    accelerator: Accelerator,
    memory: int = 2 * GIB,
    network: Network = Network.ISOLATED,
    kind: type[VirtualMachine] = VirtualMachine,
    **more: Any,
) -> Iterator[Booted]:
    """Start a VM and wait for ssh; `more` are other settings of VirtualMachine."""
    with ExitStack() as stack:
        server = stack.enter_context(imds.MetadataServer(instance.metadata))
        machine = kind(
            disk=disk,
            directory=directory / "machine",
            memory=memory,
            cpus=2,
            accelerator=accelerator,
            user=image.base.ssh_user,
            imds_port=server.port,
            network=network,
            instance_id=instance.metadata.instance_id,
            **more,
        )
        endpoint = stack.enter_context(machine)
        session = stack.enter_context(ssh.Session(endpoint, key=instance.key, directory=directory / "ssh"))
        session.wait(600, machine.check_alive)
        context = runner.Context(
            nonce=NONCE,
            machine=f"{memory / GIB:g} GiB",
            machine_memory=memory,
            disk=image.verify.disk_size,
            reserve=image.memory.reserve,
            headroom=image.memory.nanny_headroom,
            datasource=image.verify.datasource,
            role=Role.LOCAL,
            workers=image.dask.workers,
            user=image.base.ssh_user,
            public_key=instance.metadata.public_key or "",
            timeout=DASK_SECONDS,
        )
        yield Booted(
            machine=machine, session=session, context=context, directory=directory, metadata=server.tree
        )


@contextmanager
def booted(image: Image, disk: Path, directory: Path, **more: Any) -> Iterator[Booted]:
    """Boot a new instance of a disk as verification does, and wait for ssh."""
    instance = Instance.new(image, directory)
    more |= {"accelerator": accelerator(disk, directory), "disk_size": image.verify.disk_size}
    with running(image, instance, disk, directory, **more) as machine:
        yield machine


def accelerator(disk: Path, directory: Path) -> Accelerator:
    """Return what the build chose, or choose."""
    cache = HOME / "cache" / "accelerator.json"
    return choose_accelerator(disk, cache=cache, directory=directory)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A VM that has come up once and was saved with its memory, for all tests that break one."""

    instance: Instance
    accelerator: Accelerator
    disk: Path
    """An overlay of the built image, of a few megabytes."""
    memory: Path


def savable(
    image: Image, it: Saved, disk: Path, directory: Path, **more: Any
) -> AbstractContextManager[Booted]:
    """Start the VM that is to be saved, or one that goes on, on a disk that takes its writes."""
    more |= {"accelerator": it.accelerator, "kind": SavedVm, "writable": True}
    return running(image, it.instance, disk, directory, **more)


@pytest.fixture(scope="session")
def saved(
    built: Mapping[str, Any], image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Saved]:
    """The built image, booted until Dask had answered; then Dask was stopped.

    Whoever breaks it starts Dask afterwards, and so has nothing to stop first.
    """
    source = Path(built["artifact"]["location"])

    def boot(_: int) -> Saved:
        folder = tmp_path_factory.mktemp("saved")
        found = Saved(
            instance=Instance.new(image, folder),
            accelerator=accelerator(source, folder),
            disk=folder / "disk.qcow2",
            memory=folder / "memory",
        )
        create_overlay(source, found.disk, image.verify.disk_size)
        with savable(image, found, found.disk, folder) as machine:
            machine.root("systemctl is-system-running --wait", check=False)
            machine.root("until dask-health; do sleep 1; done; systemctl stop dask; sync")
            # A login would be missing its other end.
            machine.session.drop()
            assert isinstance(machine.machine, SavedVm)
            machine.machine.save(found.memory)
        return found

    saved = boot_again(boot, lambda: True)
    yield saved
    saved.memory.unlink()


@contextmanager
def guest_of(saved: Saved, image: Image, directory: Path) -> Iterator[Booted]:
    """Let a VM go on that was saved; nothing is put back.

    Its clock goes on where the saved one's stopped. Set right, the boot would seem to have been later than
    what was measured in it.
    """
    disk = directory / "disk.qcow2"
    # QEMU takes the memory for this disk alone, and an overlay of an overlay for a security risk.
    shutil.copy(saved.disk, disk)
    with savable(image, saved, disk, directory, saved=saved.memory) as machine:
        yield machine
    disk.unlink()


@pytest.fixture
def machine(saved: Saved, image: Image, tmp_path: Path) -> Iterator[Booted]:
    """A VM of the test's own, to be broken: Dask is stopped, all else is up, and nothing is put back."""
    with guest_of(saved, image, tmp_path) as machine:
        yield machine

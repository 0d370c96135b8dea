"""Logins by the system's ssh, without the user's own configuration, keys and connections."""

import contextlib
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Self

from ami_builder.core.errors import BuildFailed, TimedOut
from ami_builder.core.records import Endpoint
from ami_builder.system import processes
from ami_builder.system.processes import Completed

HOST = "dask-vm"
"""The machine's name in the generated ssh_config."""

SSH_FAILED = 255
"""The exit status of ssh if it could not connect or log in."""

REFUSED_SECONDS = 120.0
"""How long a refused login is retried at least: cloud-init creates the user during the boot."""
REFUSED_PAUSE = 6.0
"""Seconds between two refused logins: sshd >= 9.8 blocks an address that fails often (PerSourcePenalties)."""
_TIMES_REFUSED = 2.0
"""The same as a multiple of the time until the first refusal, for slow machines."""

# A socket's path has at most 103 bytes (macOS; 107 on Linux), and ssh appends 17 to it for a temporary name.
_SOCKET_BYTES = 86
_DOWN_SECONDS = 60.0
_MASTER_SECONDS = 60.0
_CHANGED = ("REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed")


class Unreachable(BuildFailed):
    """ssh itself failed: it could not connect, or the connection ended before the command did."""


def generate_key(directory: Path) -> Path:
    """Make an ed25519 key pair without a passphrase and return the private key's path (mode 0600).

    The public key is beside it, with the suffix `.pub`. An older pair in `directory` is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    key = directory / "id_ed25519"
    for old in (key, key.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    argv: list[str | Path] = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ami-builder", "-f", key]
    processes.output(argv, what="ssh-keygen")
    return key


class Session:
    """Logins to one machine over a shared connection, which ends with the context.

    `config` is an ssh_config for the host `dask-vm`, for ssh, scp and testinfra: they use the shared
    connection while it is open, and their own otherwise.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        key: Path,
        directory: Path,
        refused_pause: float = REFUSED_PAUSE,
        banner_timeout: float = 3.0,
    ) -> None:
        self._refused_pause, self._banner_timeout = refused_pause, banner_timeout
        self._endpoint = endpoint
        self._key = key.resolve()
        self._directory = directory.resolve()
        self.config = self._directory / "ssh_config"
        self._owned = ExitStack()
        self._master = ExitStack()
        self._socket = self._directory / "master"
        # AWS's tunnel is a program that needs the credentials; no other program here gets them.
        credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self._env = processes.environment(credentials) if endpoint.proxy_command else None

    def __enter__(self) -> Self:
        with ExitStack() as owned:
            self._directory.mkdir(parents=True, exist_ok=True)
            if len(os.fsencode(self._socket)) > _SOCKET_BYTES:
                short = Path(tempfile.mkdtemp(prefix="ami-builder-", dir="/tmp"))
                owned.callback(shutil.rmtree, short, ignore_errors=True)
                self._socket = short / "master"
            owned.callback(self.drop)
            # A known_hosts file here is of another machine.
            (self._directory / "known_hosts").unlink(missing_ok=True)
            self.config.write_text(self._ssh_config())
            self._owned = owned.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def wait(self, timeout: float, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until a command runs over a new shared connection.

        `alive` is called in between and may raise. Raises TimedOut after `timeout` seconds, and BuildFailed
        if the machine's host key has changed or it keeps refusing the key.
        """
        self.drop()
        began = time.monotonic()
        first_refused: float | None = None
        refused_since: float | None = None
        next_try = 0.0

        def logged_in() -> bool:
            nonlocal first_refused, refused_since, next_try
            alive()
            if time.monotonic() < next_try or not self._greets():
                return False
            errors = self._connect()
            if errors is None:
                return True
            if self._endpoint.proxy_command:
                next_try = time.monotonic() + self._refused_pause
            if any(text in errors for text in _CHANGED):
                raise BuildFailed(
                    "the machine's host key has changed",
                    hint="host keys must survive a reboot: find what replaces them in the image",
                    tail=tuple(errors.splitlines()),
                )
            if "Permission denied" in errors:
                refused_since = refused_since or time.monotonic()
                first_refused = first_refused or refused_since
                next_try = time.monotonic() + self._refused_pause
                allowed = max(REFUSED_SECONDS, _TIMES_REFUSED * (first_refused - began))
                if time.monotonic() - refused_since > allowed:
                    raise BuildFailed(
                        f"the machine refuses the ssh key of {self._endpoint.user}",
                        hint="cloud-init did not install the key: check the console log and the user's name",
                        log=self._endpoint.console_log,
                        tail=tuple(errors.splitlines()),
                    )
            else:
                refused_since = None
            return False

        processes.wait_until(
            logged_in, what="a login by ssh", timeout=timeout, log=self._endpoint.console_log
        )

    def run(
        self,
        command: str,
        *,
        sudo: bool = False,
        check: bool = True,
        timeout: float = 120.0,
        stdin: str | None = None,
    ) -> Completed:
        """Run a shell command on the machine and return its status and output.

        Raises BuildFailed with its stderr if it fails and `check` is set, Unreachable if ssh itself fails
        (status 255, whatever `check` says), TimedOut after `timeout` seconds.
        """
        argv = self._argv(command, sudo=sudo)
        what = f"`{command}` on the machine"
        done = processes.capture(argv, what=what, env=self._env, stdin=stdin, timeout=timeout)
        self._judge(command, done.status, done.stderr, check=check)
        return done

    def fetch(self, command: str, path: Path, *, sudo: bool = False, timeout: float = 300.0) -> None:
        """Write a command's output to the file `path`; raises as `run` does, and then removes the file."""
        argv = self._argv(command, sudo=sudo)
        try:
            with (
                path.open("wb") as out,
                tempfile.TemporaryFile() as err,
                processes.running(argv, env=self._env, stdout=out.fileno(), stderr=err.fileno()) as process,
            ):
                status = process.wait(timeout)
                err.seek(0)
                self._judge(command, status, err.read().decode(errors="replace"), check=True)
        except BaseException as wrong:
            path.unlink(missing_ok=True)
            if isinstance(wrong, TimeoutExpired):
                raise TimedOut(f"`{command}` on the machine took longer than {timeout:.0f} s") from wrong
            raise

    def boot_id(self) -> str:
        """Return the kernel's boot id, which changes with every reboot."""
        return self.run("cat /proc/sys/kernel/random/boot_id").stdout.strip()

    def reboot(
        self,
        timeout: float,
        alive: Callable[[], None] = lambda: None,
        went_down: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Reboot the machine from inside and wait until a login works again; raises as `wait` does.

        `went_down` is called once when the machine shuts down, with the seconds that are left.
        """
        before = self.boot_id()
        # The connection may end before the command does.
        with contextlib.suppress(Unreachable):
            self.run("systemctl reboot", sudo=True)
        deadline = time.monotonic() + timeout
        # Until it shuts down, the old system accepts logins, and each would delay the shutdown. The end of
        # our connection shows that it has begun.
        with contextlib.suppress(TimedOut):
            processes.wait_until(
                lambda: not self._socket.exists(), what="the shutdown", timeout=min(timeout, _DOWN_SECONDS)
            )
        self.drop()
        went_down(max(1.0, deadline - time.monotonic()))

        def rebooted() -> bool:
            with contextlib.suppress(Unreachable):
                self.wait(max(1.0, deadline - time.monotonic()), alive)
                if self.boot_id() != before:
                    return True
            self.drop()
            return False

        processes.wait_until(rebooted, what="a reboot", timeout=timeout, log=self._endpoint.console_log)

    def drop(self) -> None:
        """Close the shared connection, if there is one."""
        self._master.close()
        self._socket.unlink(missing_ok=True)

    def _greets(self) -> bool:
        """Return whether an ssh server answers: QEMU accepts connections before the guest has booted."""
        if self._endpoint.proxy_command:
            return True
        address = (self._endpoint.address, self._endpoint.port)
        try:
            with socket.create_connection(address, timeout=self._banner_timeout) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _connect(self) -> str | None:
        """Open the shared connection and try it; return None, or the errors of ssh."""
        errors = self._directory / "ssh.log"
        with ExitStack() as owned:
            with errors.open("wb") as log:
                # The shared connection itself, a child that ends with this process.
                argv = ["ssh", "-F", str(self.config), "-M", "-N", HOST]
                master = owned.enter_context(processes.running(argv, env=self._env, stdout=log.fileno()))

            def settled() -> bool:
                return self._socket.exists() or master.poll() is not None

            try:
                processes.wait_until(settled, what="a login by ssh", timeout=_MASTER_SECONDS, interval=0.05)
                if master.poll() is None:
                    self._master = owned.pop_all()
                    self.run("true", timeout=_MASTER_SECONDS)
                    return None
            except (TimedOut, BuildFailed):
                self.drop()
        return errors.read_text(errors="replace")

    def _argv(self, command: str, *, sudo: bool) -> list[str]:
        if sudo and self._endpoint.user != "root":
            command = f"sudo -n -- sh -c {shlex.quote(command)}"
        return ["ssh", "-F", str(self.config), HOST, "--", command]

    def _judge(self, command: str, status: int, stderr: str, *, check: bool) -> None:
        tail = tuple(stderr.strip().splitlines()[-processes.TAIL_LINES :])
        log = self._endpoint.console_log
        if status == SSH_FAILED:
            raise Unreachable(f"ssh to the machine failed (`{command}`)", log=log, tail=tail)
        if check and status != 0:
            raise BuildFailed(f"`{command}` failed on the machine (exit status {status})", log=log, tail=tail)

    def _ssh_config(self) -> str:
        lines = {
            "HostName": self._endpoint.address,
            "Port": str(self._endpoint.port),
            "User": self._endpoint.user,
            "IdentityFile": _quoted(self._key),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "PreferredAuthentications": "publickey",
            # The first host key is accepted; a changed one is refused later.
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": _quoted(self._directory / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": HOST,
            "UpdateHostKeys": "no",
            # Use the shared connection, and never open another shared one.
            "ControlMaster": "no",
            "ControlPath": _quoted(self._socket),
            "ConnectTimeout": "30",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "8",
            "ForwardAgent": "no",
            "LogLevel": "ERROR",
        }
        if self._endpoint.address.startswith("127."):
            # On an emulated VM the key exchange and the cipher take seconds; nobody can listen on loopback.
            lines |= {
                "KexAlgorithms": "^curve25519-sha256",
                "Ciphers": "^aes128-ctr",
                "MACs": "^umac-64-etm@openssh.com",
            }
        if self._endpoint.proxy_command:
            lines["ProxyCommand"] = self._endpoint.proxy_command
        return f"Host {HOST}\n" + "".join(f"    {name} {value}\n" for name, value in lines.items())


def _quoted(path: Path) -> str:
    # ssh_config expands % in paths.
    return '"' + str(path).replace("%", "%%") + '"'

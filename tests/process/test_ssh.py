"""Sessions over the system's ssh with a real sshd on loopback, one process a connection."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ami_builder.core.errors import BuildFailed, TimedOut
from ami_builder.core.records import Endpoint
from ami_builder.system import processes, ssh
from ami_builder.system.processes import Completed
from ami_builder.system.ssh import Session, Unreachable
from tests.fake_programs import calls, fake

ROOT = Path(__file__).resolve().parents[2]

SSHD = shutil.which("sshd", path="/usr/sbin") or str(ROOT / ".cache" / "tools" / "usr" / "sbin" / "sshd")
_AS_ROOT = 'mount --bind "$0" /etc/passwd && exec "$@"'

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="sshd is not here; scripts/test brings it")


def _sshd(folder: Path) -> list[str]:
    """Return what runs sshd; root's wants a user of that name, which is there where it is installed."""
    passwd = Path("/etc/passwd").read_text()
    if os.geteuid() != 0 or "\nsshd:" in passwd:
        return [SSHD]
    ours = folder / "passwd"
    ours.write_text(f"{passwd}sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
    ours.chmod(0o644)
    return ["unshare", "--mount", "sh", "-c", _AS_ROOT, str(ours), SSHD]


class Server:
    """An sshd for each connection (-i), so that its port is never guessed and its files may change."""

    def __init__(self, folder: Path, authorized: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.sshd = _sshd(folder)
        self.config = folder / "sshd_config"
        self.authorized = folder / "authorized_keys"
        self.authorized.write_bytes(authorized.read_bytes())
        self.new_host_key()
        self.config.write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {self.authorized}\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nLogLevel VERBOSE\n"
            "KbdInteractiveAuthentication no\n"
        )
        self.children: list[subprocess.Popen[bytes]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def new_host_key(self) -> None:
        key = self.folder / "host_key"
        key.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, (self.folder / "log").open("ab") as log:
                argv = [*self.sshd, "-i", "-e", "-f", str(self.config)]
                end = connection.fileno()
                child = subprocess.Popen(argv, stdin=end, stdout=end, stderr=log)
                self.children.append(child)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for child in self.children:
            child.terminate()
            child.wait()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return ssh.generate_key(tmp_path / "key")


@pytest.fixture
def server(tmp_path: Path, key: Path) -> Iterator[Server]:
    if os.geteuid() == 0:
        # sshd insists on it when root runs it; Debian makes it when the service starts.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    it = Server(tmp_path / "sshd", key.with_suffix(".pub"))
    yield it
    it.close()


@pytest.fixture
def make(server: Server, key: Path, tmp_path: Path) -> Callable[..., Session]:
    def session(
        name: str = "session", *, port: int | None = None, user: str | None = None, **options: float
    ) -> Session:
        endpoint = Endpoint(
            address="127.0.0.1",
            port=port or server.port,
            user=user or getpass.getuser(),
            console_log=tmp_path / "console.log",
        )
        return Session(endpoint, key=key, directory=tmp_path / name, **options)

    return session


Make = Callable[..., Session]


def masters(session: Session) -> list[str]:
    """Return the processes of this machine that hold the session's configuration."""
    wanted = str(session.config).encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_key(key: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = key.with_suffix(".pub").read_text()
    assert public.startswith("ssh-ed25519 ")
    told = subprocess.check_output(["ssh-keygen", "-y", "-P", "", "-f", key], text=True)
    assert told.split()[:2] == public.split()[:2]
    again = ssh.generate_key(tmp_path / "key")
    assert again == key
    assert key.with_suffix(".pub").read_text() != public


def test_run(make: Make) -> None:
    with make() as session:
        session.wait(60)
        assert session.run("echo out; echo err >&2; exit 3", check=False) == Completed(
            status=3, stdout="out\n", stderr="err\n"
        )
        assert session.run("printf '%s|' 'a  b' \"$0\"").stdout.startswith("a  b|")
        assert session.run("cat", stdin="in\n").stdout == "in\n"
        assert session.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_failing_command_is_named_with_its_last_words(make: Make) -> None:
    with make() as session:
        session.wait(60)
        with pytest.raises(
            BuildFailed, match=r"`ls /nothing` failed on the machine .exit status 2."
        ) as caught:
            session.run("ls /nothing")
    assert "No such file" in caught.value.tail[-1]
    assert not isinstance(caught.value, Unreachable)


def test_a_slow_command_times_out(make: Make) -> None:
    with make() as session:
        session.wait(60)
        with pytest.raises(TimedOut, match=r"`sleep 60` on the machine"):
            session.run("sleep 60", timeout=0.5)
        assert session.run("echo goes on").stdout == "goes on\n"


def test_one_connection_for_all(make: Make, server: Server) -> None:
    with make() as session:
        session.wait(60)
        before = len(server.children)
        for _ in range(3):
            session.run("true")
        subprocess.run(["ssh", "-F", session.config, ssh.HOST, "true"], check=True)
        assert len(server.children) == before


def test_the_configuration_names_only_ours(make: Make, key: Path) -> None:
    with make() as session:
        told = subprocess.check_output(["ssh", "-G", "-F", session.config, ssh.HOST], text=True)
    options = {tuple(line.split(" ", 1)) for line in told.splitlines()}
    ciphers = next(rest[0] for k, *rest in options if k == "ciphers").split(",")
    assert ciphers[0] == "aes128-ctr"
    assert "chacha20-poly1305@openssh.com" in ciphers
    assert {v for k, *rest in options for v in rest if k == "identityfile"} == {str(key)}
    assert {
        ("identitiesonly", "yes"),
        ("identityagent", "none"),
        ("batchmode", "yes"),
        ("globalknownhostsfile", "/dev/null"),
        ("stricthostkeychecking", "accept-new"),
        ("controlmaster", "false"),
        ("forwardagent", "no"),
        ("passwordauthentication", "yes"),
        ("preferredauthentications", "publickey"),
    } <= options


@pytest.mark.parametrize("folder", ["s", "long" * 30])
def test_nothing_is_left(make: Make, folder: str) -> None:
    with make(folder) as session, make("other") as other:
        session.wait(60)
        other.wait(60)
        assert masters(session)
        opened = session._socket
        assert stat.S_IMODE(opened.stat().st_mode) == 0o600
        # In the session's own folder, unless its path is too long for a socket.
        assert (opened.parent == session.config.parent) == (folder == "s")
        session.__exit__(None, None, None)
        assert not masters(session)
        assert not opened.exists()
        assert opened.parent.exists() == (folder == "s")
        # Another session's connection is none of its business.
        assert masters(other)
        assert other.run("echo there").stdout == "there\n"
    assert not masters(other)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error(make: Make, error: type[BaseException]) -> None:
    session = make()

    def fails() -> None:
        with session:
            session.wait(60)
            raise error

    with pytest.raises(error):
        fails()
    assert not masters(session)


def test_dropping_ends_the_connection(make: Make, server: Server) -> None:
    with make() as session:
        session.wait(60)
        session.drop()
        assert not masters(session)
        before = len(server.children)
        session.wait(60)
        assert len(server.children) > before
        assert session.run("echo again").stdout == "again\n"


def test_a_dead_connection_is_no_reason_to_fail(make: Make) -> None:
    with make() as session:
        session.wait(60)
        for pid in masters(session):
            os.kill(int(pid), signal.SIGKILL)
        assert session.run("echo by itself").stdout == "by itself\n"


def test_a_machine_that_went_away(make: Make, server: Server) -> None:
    with make() as session:
        session.wait(60)
        session.drop()
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()
        with pytest.raises(Unreachable) as caught:
            session.run("true", check=False)
        assert "refused" in caught.value.tail[-1]
        server.listener = socket.create_server(("127.0.0.1", 0))


def test_another_machine_is_refused(make: Make, server: Server) -> None:
    with make() as session:
        session.wait(60)
        server.new_host_key()
        with pytest.raises(BuildFailed, match="host key has changed"):
            session.wait(60)
    with make() as later:
        later.wait(60)


def test_a_refusal_is_forgiven_while_the_machine_boots(make: Make, server: Server) -> None:
    public = server.authorized.read_text()
    server.authorized.write_text("")
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            server.authorized.write_text(public)

    with make(refused_pause=0.0) as session:
        session.wait(60, alive)
        assert calls >= 3
        assert session.run("echo in").stdout == "in\n"


def test_a_refusal_that_persists_is_told(make: Make, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "REFUSED_SECONDS", 0.0)
    server.authorized.write_text("")
    session = make(refused_pause=0.0)
    with session, pytest.raises(BuildFailed, match=f"refuses the ssh key of {getpass.getuser()}") as caught:
        session.wait(60)
    assert "Permission denied" in caught.value.tail[-1]
    assert not masters(session)


class Refusing:
    """A machine that greets after some seconds and refuses the key from then on, and a clock for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session: Session, greets: float) -> None:
        self.now, self.greets = 1000.0, 1000.0 + greets
        self.says = [(0.0, "Permission denied (publickey).")]
        """What ssh says, each from so many seconds on."""
        monkeypatch.setattr(ssh, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(processes, "wait_until", self.wait_until)
        monkeypatch.setattr(session, "_greets", lambda: self.now >= self.greets)
        monkeypatch.setattr(session, "_connect", self.connect)
        self.session = session

    def wait_until(self, look: Callable[[], bool], *, timeout: float, **_: object) -> None:
        end = self.now + timeout
        while not look():
            self.now += 1
            if self.now > end:
                raise TimedOut("a login by ssh")

    def connect(self) -> str | None:
        return [said for since, said in self.says if self.now >= 1000.0 + since][-1] or None

    def refused_after(self, timeout: float = 3600) -> float:
        """Return for how many seconds refusals were put up with."""
        with pytest.raises(BuildFailed, match="refuses the ssh key"):
            self.session.wait(timeout)
        return self.now - self.greets


@pytest.mark.parametrize(("greets", "seconds"), [(0, 120), (10, 120), (60, 120), (100, 200), (300, 600)])
def test_a_slow_machine_may_refuse_for_longer(
    make: Make, monkeypatch: pytest.MonkeyPatch, greets: float, seconds: float
) -> None:
    """cloud-init makes the user while the machine boots: it takes as much longer as the boot does."""
    refusing = Refusing(monkeypatch, make(), greets)
    assert seconds < refusing.refused_after() <= seconds + ssh.REFUSED_PAUSE + 1


def test_the_first_refusal_is_the_measure(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins late, after another error, is not put up with for longer."""
    refusing = Refusing(monkeypatch, make(), 10)
    denied = "Permission denied (publickey)."
    refusing.says = [(0, denied), (60, "Connection reset"), (1000, denied)]
    assert 1000 + 120 < refusing.refused_after() + 10 <= 1000 + 120 + ssh.REFUSED_PAUSE + 1


def test_a_key_that_is_taken_late_is_taken(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing(monkeypatch, make(), 200)
    refusing.says.append((590.0, ""))
    refusing.session.wait(3600)
    assert 1590 <= refusing.now < 1600


def test_waiting_ends_when_the_machine_dies(make: Make) -> None:
    def dead() -> None:
        raise BuildFailed("QEMU failed")

    with make(port=1) as session, pytest.raises(BuildFailed, match="QEMU failed"):
        session.wait(60, dead)


def test_nobody_answers(make: Make, tmp_path: Path) -> None:
    with make(port=1) as session, pytest.raises(TimedOut, match="a login by ssh") as caught:
        session.wait(0.1)
    assert caught.value.log == tmp_path / "console.log"


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 no\r\n"])
def test_a_port_that_is_not_ssh(make: Make, says: bytes) -> None:
    taken: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.sendall(says)
            taken.append(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with make(port=port, banner_timeout=0.2) as session, pytest.raises(TimedOut):
            session.wait(0.5)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in taken:
        connection.close()
    assert taken


def test_fetch(make: Make, tmp_path: Path) -> None:
    to = tmp_path / "out"
    with make() as session:
        session.wait(60)
        session.fetch("printf 'a\\000\\377b'; head -c 3000000 /dev/zero", to)
        assert to.read_bytes() == b"a\0\xffb" + b"\0" * 3_000_000
        with pytest.raises(BuildFailed, match="failed on the machine") as caught:
            session.fetch("echo half; echo why >&2; exit 1", to)
        assert caught.value.tail == ("why",)
        assert not to.exists()
        with pytest.raises(TimedOut):
            session.fetch("sleep 60", to, timeout=0.5)
        assert not to.exists()


def test_root_needs_no_sudo(make: Make) -> None:
    command = "echo 'a b' > /x; \"$y\""
    assert make(user="root")._argv(command, sudo=True)[-1] == command
    sudo = make(user="admin")._argv(command, sudo=True)[-1]
    assert shlex.split(sudo) == ["sudo", "-n", "--", "sh", "-c", command]


class Rebooting:
    """Stands in for `Session.run`: a real `systemctl reboot` would reboot the machine that runs the tests."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.boots = iter(["one", "one", "two"])

    def __call__(self, command: str, **_: object) -> Completed:
        self.commands.append(command)
        if command == "systemctl reboot":
            raise Unreachable("the connection ended")
        return Completed(status=0, stdout=next(self.boots) + "\n", stderr="")


def test_reboot_waits_for_another_boot(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    rebooting = Rebooting()
    monkeypatch.setattr(session, "run", rebooting)
    waits = []
    monkeypatch.setattr(session, "wait", lambda timeout, alive: waits.append(alive))

    def alive() -> None: ...

    left: list[float] = []
    session.reboot(60, alive, left.append)
    assert rebooting.commands.count("systemctl reboot") == 1
    assert waits == [alive, alive]
    assert left == [pytest.approx(60, abs=10)]


def test_it_is_told_once_that_the_machine_goes_down_and_how_long_it_may_still_take(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody waits for a login, and when our connection has ended."""
    session, clock, seconds = make(), [1000.0], 100.0
    monkeypatch.setattr(ssh, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(session, "run", Rebooting())
    events: list[str] = []

    def ends(look: Callable[[], bool], *, what: str, timeout: float, **_: object) -> None:
        clock[0] += 45
        if what == "the shutdown":
            assert timeout == min(60, seconds)
            events.append(what)
            raise TimedOut("it goes on")
        while not look():
            clock[0] += 1

    monkeypatch.setattr(processes, "wait_until", ends)
    monkeypatch.setattr(session, "drop", lambda: events.append("drop"))
    monkeypatch.setattr(session, "wait", lambda timeout, alive: events.append(f"wait {timeout:.0f}"))
    session.reboot(seconds, went_down=lambda left: events.append(f"went down, {left:.0f} left"))
    assert events[:4] == ["the shutdown", "drop", "went down, 55 left", "wait 10"]
    assert sum("went down" in event for event in events) == 1
    clock[0], events[:] = 1000.0, []
    monkeypatch.setattr(session, "run", Rebooting())
    seconds = 20
    session.reboot(seconds, went_down=lambda left: events.append(f"went down, {left:.0f} left"))
    assert "went down, 1 left" in events, "never less"


def test_reboot_ends_when_the_machine_does_not_go_down(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    monkeypatch.setattr(session, "run", Rebooting())
    monkeypatch.setattr(session, "wait", lambda timeout, alive: pytest.fail("nobody is to log in"))

    def late(seconds: float) -> None:
        raise TimedOut("the guest to go down took longer than 60 s")

    with pytest.raises(TimedOut, match="to go down"):
        session.reboot(60, went_down=late)


def test_reboot_gives_up_when_the_machine_dies(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    monkeypatch.setattr(session, "run", Rebooting())

    def dies(timeout: float, alive: Callable[[], None]) -> None:
        raise BuildFailed("QEMU failed")

    monkeypatch.setattr(session, "wait", dies)
    with pytest.raises(BuildFailed, match="QEMU failed"):
        session.reboot(60)


def test_ssh_is_never_given_a_terminal_or_a_shell_of_ours(make: Make) -> None:
    """What the machine's shell gets is what was asked for, whatever it holds."""
    with make() as session:
        session.wait(60)
        for text in ("$(touch /tmp/never)", "-oProxyCommand=false", "a'b\"c", "line\nline"):
            assert session.run(f"printf %s {shlex.quote(text)}").stdout == text


@pytest.mark.needs("socat")
def test_a_machine_without_an_open_port_is_reached_through_a_program(
    server: Server, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(
        tmp_path,
        "aws",
        f'env | grep ^AWS_ >"$0.env"\n[ -e "$0.up" ] || {{ : >"$0.up"; echo not connected >&2; exit 255; }}\n'
        f"exec socat STDIO TCP4:127.0.0.1:{server.port}",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("AWS_PROFILE", "ours")
    endpoint = Endpoint(
        address="i-0123456789abcdef0",
        port=2222,
        user=getpass.getuser(),
        console_log=tmp_path / "console.log",
        proxy_command="aws ssm start-session --target i-0123456789abcdef0 --parameters portNumber=%p",
    )
    with Session(endpoint, key=key, directory=tmp_path / "session", refused_pause=0.1) as session:
        session.wait(60)
        assert session.run("echo hello").stdout == "hello\n"
        session.fetch("echo there", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_text() == "there\n"
    expected = "ssm start-session --target i-0123456789abcdef0 --parameters portNumber=2222"
    assert calls(tmp_path, "aws") == [expected, expected], (
        "the second time it was up, and shared from then on"
    )
    assert "AWS_PROFILE=ours" in (tmp_path / "aws.env").read_text().splitlines()
    assert "ours" not in session.config.read_text()

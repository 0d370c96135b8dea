"""Find programs, start processes, wait; no other module starts a process or sleeps."""

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ami_builder.core.errors import AmiBuilderError, BuildFailed, Interrupted, MissingTool, TimedOut

PACKAGES: Mapping[str, str] = {
    "packer": "packer",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "newuidmap": "uidmap",
    "grub-mkimage": "grub-common",
    "xorriso": "xorriso",
    "socat": "socat",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "setpriv": "util-linux",
}
"""Program -> the package of Debian and Ubuntu that contains it."""

_NATIVE: Mapping[str, str] = {
    "qemu-system-x86": "x86_64",
    "ovmf": "x86_64",
    "qemu-system-arm": "aarch64",
    "qemu-efi-aarch64": "aarch64",
}
"""Package -> the machine where set-up installs it; elsewhere it is for images of another architecture."""

DISK_FULL = "the disk is full: free some space, or set AMI_BUILDER_HOME to a folder on a larger disk"
STOP_SECONDS = 20.0
TAIL_LINES = 15

# What a child needs to find its tools, caches and proxies; never a cloud credential or a token.
_KEPT_ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TERM", "LANG", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE",
)  # fmt: skip
_KEPT_PREFIXES = ("PIP_", "AMI_BUILDER_", "LC_")
_UNKEPT_PREFIX = "AMI_BUILDER_WEBHOOK"

EXHAUSTED = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EFAULT})
"""Why a host that is short of memory or processes starts none; EFAULT was seen once, on a busy host in CI."""
_START_AGAIN_SECONDS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)

T = TypeVar("T")


class Scope:
    """Processes and waits that are cancelled together, with those of the scopes within."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.children: set[subprocess.Popen[str]] = set()
        self.within: set[Scope] = set()

    def cancel(self) -> None:
        """Stop the child processes as `stop` does, and let waits raise Interrupted.

        Cleaning up still works.
        """
        self._end()
        self._signal(signal.SIGTERM)
        # Threads read the output of their processes until these end.
        killer = threading.Timer(STOP_SECONDS, self._signal, [signal.SIGKILL])
        killer.daemon = True
        killer.start()

    def _end(self) -> None:
        # First, so that what begins now sees it.
        self.cancelled.set()
        for scope in tuple(self.within):
            scope._end()

    def _signal(self, number: signal.Signals) -> None:
        for process in tuple(self.children):
            _signal_group(process, number)
        for scope in tuple(self.within):
            scope._signal(number)

    def refuse_when_cancelled(self) -> None:
        """Raise Interrupted if this scope is cancelled."""
        if self.cancelled.is_set():
            raise Interrupted("stopped")


_scope = ContextVar("scope", default=Scope())  # noqa: B039 - the whole program's


@contextmanager
def scope() -> Iterator[Scope]:
    """Give what the block starts a scope of its own, within the one that is there.

    A thread belongs to the scope whose context it runs in (`contextvars.copy_context`).
    """
    outer, inner = _scope.get(), Scope()
    outer.within.add(inner)
    if outer.cancelled.is_set():
        inner.cancelled.set()
    before = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(before)
        outer.within.discard(inner)


def find(program: str) -> Path:
    """Return the path of `program`; raises MissingTool with the package that contains it."""
    found = _search(program)
    if found is None:
        raise MissingTool(f"{program} is not installed", hint=how_to_install(PACKAGES.get(program, program)))
    return found


def how_to_install(package: str) -> str:
    """Return what to do on this host to get a package of Debian and Ubuntu."""
    if package == "packer":
        # Only Debian 12 has a package of it.
        return "see developer.hashicorp.com/packer/install; in a clone, scripts/ami-builder fetches it"
    if not _search("apt-get"):
        return f"install {package} (its name in Debian and Ubuntu)"
    if _NATIVE.get(package, platform.machine()) != platform.machine():
        return f"run apt-get install {package}"
    return f"run apt-get install {package}; in a clone, scripts/ami-builder check installs what is missing"


def _search(program: str) -> Path | None:
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=search)
    return Path(found) if found is not None else None


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: variables for tools, caches and proxies, without credentials."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if (k in _KEPT_ENVIRONMENT or k.startswith(_KEPT_PREFIXES)) and not k.startswith(_UNKEPT_PREFIX)
    }
    kept["PATH"] = os.pathsep.join([kept.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return kept | dict(extra or {})


def start(call: Callable[[], T]) -> T:
    """Return what `call` returns, which starts a process; call it again if this host can't start one now.

    A host that is short of memory or of processes refuses for a moment. Raises OSError if it goes on.
    """
    for seconds in _START_AGAIN_SECONDS:
        try:
            return call()
        except OSError as wrong:
            if wrong.errno not in EXHAUSTED:
                raise
        time.sleep(seconds)
    return call()


@contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.STDOUT,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[str]]:
    """Run a child process in its own session, and stop it when the block ends.

    If this process is killed (kill -9), Linux sends the child SIGTERM, so that no child outlives it. On
    other systems, and without util-linux, a child may then run on; `gc` finds what one leaves in an account.
    """
    scope = _scope.get()
    scope.refuse_when_cancelled()
    find(str(argv[0]))
    process = start(
        lambda: subprocess.Popen(
            [*_ending_with_parent(), *(str(a) for a in argv)],
            env=environment() if env is None else dict(env),
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    )
    scope.children.add(process)
    try:
        if scope.cancelled.is_set():
            # The scope was cancelled while the process started, and did not know it.
            _signal_group(process, signal.SIGTERM)
        yield process
    finally:
        stop(process)
        scope.children.discard(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _ending_with_parent() -> list[str]:
    """Return the words before a command that let it end with this process; none where that is impossible."""
    setpriv = _search("setpriv") if sys.platform == "linux" else None
    # BusyBox's has no such option.
    if setpriv is None or setpriv.resolve().name == "busybox":
        return []
    return [str(setpriv), "--pdeathsig", "TERM", "--"]


def stop(process: subprocess.Popen[str], *, seconds: float | None = None) -> None:
    """End a child's process group: SIGTERM first, so that it can clean up, SIGKILL after `seconds` (20)."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS if seconds is None else seconds)
    # Children of the child may outlive it in the same group.
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    # macOS refuses (EPERM) where a group's processes have all ended, but were not waited for.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def stream(
    argv: Sequence[str | Path],
    *,
    log: Path,
    what: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | Callable[[], float],
    on_line: Callable[[str], None] | None = None,
    merge: bool = True,
    missing: int | None = None,
) -> None:
    """Run a long command with its output in `log`; `on_line` gets each line.

    With `merge=False` stderr goes to the log alone.
    `missing` is the exit status with which it reports that a program is missing: MissingTool is raised then.
    Raises BuildFailed with the last lines when it fails, TimedOut after `timeout` seconds, which may grow.
    """
    began = time.monotonic()
    limit = timeout if callable(timeout) else lambda: timeout
    with (
        log.open("a", encoding="utf-8") as out,
        running(
            argv,
            env=env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else out.fileno(),
        ) as process,
    ):
        assert process.stdout is not None
        with _alarm(process, began, limit):
            for line in process.stdout:
                out.write(line)
                out.flush()
                if on_line is not None:
                    on_line(line.rstrip())
            status = process.wait()
    _scope.get().refuse_when_cancelled()
    if time.monotonic() >= began + limit():
        raise TimedOut(f"{what} took longer than {limit():.0f} s", log=log, tail=last_lines(log))
    if status != 0:
        tail = last_lines(log)
        # If the disk is full, the log may lack the message too.
        full = any("No space left on device" in line for line in tail)
        full = full or shutil.disk_usage(log.parent).free < 1 << 20
        kind: type[AmiBuilderError] = BuildFailed
        hint = DISK_FULL if full else None
        if status == missing and not full:
            kind, hint = MissingTool, "`ami-builder check` lists everything that is missing"
        raise kind(f"{what} failed (exit status {status})", hint=hint, log=log, tail=tail)


def last_lines(log: Path, count: int = TAIL_LINES) -> tuple[str, ...]:
    """Return the last lines of a log; none if there is no log."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            return tuple(line.rstrip() for line in deque(file, maxlen=count))
    except FileNotFoundError:
        return ()


@contextmanager
def _alarm(process: subprocess.Popen[str], began: float, limit: Callable[[], float]) -> Iterator[None]:
    """Stop `process` once the limit has passed, because reading its output has no timeout."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(max(0.0, began + limit() - time.monotonic())):
            if time.monotonic() >= began + limit():
                stop(process)
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The status and output of a finished command."""

    status: int
    stdout: str
    stderr: str


def capture(
    argv: Sequence[str | Path],
    *,
    what: str,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout: float = 60.0,
) -> Completed:
    """Run a command and return its status and output, whatever the status.

    Raises TimedOut, naming `what`, after `timeout` seconds.
    """
    source = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    with running(argv, env=env, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired as late:
            raise TimedOut(f"{what} took longer than {timeout:.0f} s") from late
    _scope.get().refuse_when_cancelled()
    return Completed(status=process.returncode, stdout=stdout, stderr=stderr)


def output(
    argv: Sequence[str | Path],
    *,
    what: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    error: type[AmiBuilderError] = BuildFailed,
) -> str:
    """Run a short command and return its stdout; raises `error` with its stderr when it fails.

    Unlike the others, it also works in a cancelled scope, so that cleaning up can use it.
    """
    find(str(argv[0]))
    name = what or Path(str(argv[0])).name
    try:
        done = start(
            lambda: subprocess.run(
                [str(a) for a in argv],
                env=environment() if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        )
    except subprocess.TimeoutExpired as late:
        raise TimedOut(f"{name} took longer than {timeout:.0f} s") from late
    if done.returncode != 0:
        lines = tuple(done.stderr.strip().splitlines()[-TAIL_LINES:])
        raise error(f"{name} failed (exit status {done.returncode})", tail=lines)
    return done.stdout


def wait_until(
    probe: Callable[[], T | None],
    *,
    what: str,
    timeout: float,
    interval: float = 0.5,
    log: Path | None = None,
) -> T:
    """Call `probe` until it returns a true value, and return that value.

    Raises TimedOut, naming `what`, after `timeout` seconds.
    """
    scope, deadline = _scope.get(), time.monotonic() + timeout
    while True:
        if value := probe():
            return value
        if time.monotonic() >= deadline:
            raise TimedOut(f"{what} did not happen within {timeout:.0f} s", log=log)
        scope.cancelled.wait(interval)
        scope.refuse_when_cancelled()

"""Retire the Dask workers of this machine: other workers take their data, then they close.

Run by retire-workers@SECONDS.service as root; Python 3.9 and later. It finds the Dask processes of all
containers, and runs retire.py with the interpreter, the packages and the settings of each: in its
namespaces and as its user, but outside its cgroup, because importing Dask takes 60 to 100 MB that the
workers' limit does not have. Nothing of a container runs with privileges here: what runs there may have
changed its files.

Argument: the most seconds that it may take.
Exit status: 0 if no worker process is left, 1 if one is, 3 if the scheduler is on this machine and nothing
has retired, 4 if no process of Dask was recognized.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("retire.py")
SCHEDULER_IS_HERE = 3
NO_DASK = 4
GRACE = 5
"""Seconds to the kill of a process that does not keep to its time."""
CLOSE = 30
"""Seconds for a worker's process to end after its retirement."""
AT_ONCE = 4
"""How many programs run at the same time: each takes up to 100 MB."""
LINES = 100
"""Lines that are logged of a program of a container."""

TITLE = re.compile(rb"dask scheduler \[")
"""What a scheduler sets with setproctitle in place of its command line. A worker's nanny keeps its own."""
DASK = re.compile(
    rb"(?:^|\0)(?:[^\0]*/)?(?:dask\0|dask-|distributed\.cli\.dask_|dask_|dask_cuda\.cli\0)"
    rb"(?:cuda[\0_-])?(scheduler|spec|worker)(?:\.py)?\0"
)
"""What names Dask's program in a command line, such as `python -m distributed.cli.dask_spec`."""

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_NAMESPACES = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
"""Their names in /proc, and the types of clone(2)."""


@dataclass(frozen=True)
class DaskProcess:
    """A `dask scheduler`, `dask spec` or `dask worker` that runs on this machine."""

    pid: int
    interpreter: str
    kind: str
    words: list[str]
    """The command line after that."""


def say(priority: int, text: str) -> None:
    """Log a line; systemd reads the priority in the angle brackets."""
    print(f"<{priority}>retire-workers: {text}", flush=True)


def recognized(pid: int, executable: str, command: bytes) -> DaskProcess | None:
    """Return the Dask process with this command line, as /proc has it; None if it is another program."""
    found = DASK.search(command)
    # A shell, an init, or `docker run` with Dask's command is not the process itself.
    if not re.match(r"(python|pypy)[0-9.]*t?d?( \(deleted\))?$", executable.rpartition("/")[2]):
        return None
    if TITLE.match(command):
        return DaskProcess(pid=pid, interpreter=executable, kind="scheduler", words=[])
    if found is None:
        return None
    words = [os.fsdecode(word) for word in command[found.end() :].split(b"\0")][:-1]
    interpreter = os.fsdecode(command.partition(b"\0")[0])
    return DaskProcess(pid=pid, interpreter=interpreter, kind=found[1].decode(), words=words)


def dask_processes() -> list[DaskProcess]:
    """Return the Dask processes of this machine, one of each command line for each container."""
    found: dict[tuple[str, ...], DaskProcess] = {}
    for folder in sorted(Path("/proc").iterdir()):
        if not folder.name.isdigit():
            continue
        try:
            executable = os.readlink(folder / "exe")
            process = recognized(int(folder.name), executable, (folder / "cmdline").read_bytes())
            if process is not None:
                container = tuple(os.readlink(folder / "ns" / name) for name in ("mnt", "net"))
                found.setdefault((process.kind, *process.words, *container), process)
        except OSError:  # a kernel thread, or it has ended
            continue
    return list(found.values())


def addresses(pid: int) -> list[str]:
    """Return the addresses of a process's network, without loopback."""
    # The table of local routes: each address follows in the line before its kind.
    trie = Path(f"/proc/{pid}/net/fib_trie").read_text()
    found = {match[1] for match in re.finditer(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", trie)}
    try:
        lines = Path(f"/proc/{pid}/net/if_inet6").read_text().splitlines()
    except OSError:  # a kernel without IPv6
        lines = []
    for line in lines:
        digits, _, _, scope, _, name = line.split()
        if name != "lo" and scope != "20":  # link-local
            found.add(str(ipaddress.IPv6Address(int(digits, 16))))
    return sorted(each for each in found if not each.startswith("127."))


def enter(namespaces: list[int]) -> None:
    """Enter the namespaces of these files; os.setns came with Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    for each, kind in zip(namespaces, _NAMESPACES.values()):
        # The unit's RestrictNamespaces= refuses the type 0.
        if libc.setns(each, kind):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
        os.close(each)


def become(user: int, group: int, groups: list[int]) -> None:
    """Take over a user's ids, and give up all privileges, also root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if capability == 0:
        raise OSError(ctypes.get_errno(), "the capabilities can't be dropped")
    os.setgroups(groups)
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    # With an empty bounding set, exec leaves root no capability either.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


class Output:
    """What a program of a container prints, for the journal. It may be hostile."""

    def __init__(self) -> None:
        self.end, self.write = os.pipe()
        self.lines = 0
        self.rest = b""
        os.set_blocking(self.end, False)

    def log(self) -> None:
        """Log what has come."""
        while True:
            try:
                data = os.read(self.end, 65536)
            except BlockingIOError:
                return
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self._log(line)
            if not data or len(self.rest) > 65536:
                self._log(self.rest)
                self.rest = b""
            if not data:
                return

    def _log(self, line: bytes) -> None:
        self.lines += bool(line)
        if line and self.lines <= LINES:
            print(harmless(line.decode(errors="replace")), flush=True)


def harmless(line: str) -> str:
    """Return a line with a priority of 3 to 6, as retire.py's have; another is a warning."""
    found = re.match(r"<[3-6]>(?!<)", line)
    text = re.sub(r"^(<\d+>)+", "", line)
    printable = "".join(each if each.isprintable() else "?" for each in text)[:1000]
    return f"{found[0] if found else '<4>'}{printable}"


def start(process: DaskProcess, argument: str, output: int) -> int:
    """Start retire.py beside a Dask process, and return the pid to wait for."""
    proc = Path(f"/proc/{process.pid}")
    variables = (proc / "environ").read_bytes().split(b"\0")
    environment = dict(each.split(b"=", 1) for each in variables if b"=" in each)
    environment.update({b"PYTHONDONTWRITEBYTECODE": b"1", b"PYTHONSAFEPATH": b"1"})
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
    user, group = (int(status[name].split()[0]) for name in ("Uid", "Gid"))
    groups = [int(each) for each in status["Groups"].split()]
    folder = os.readlink(proc / "cwd")
    command = [process.interpreter, "-c", PROGRAM.read_text(), argument]
    namespaces = [os.open(proc / "ns" / name, os.O_RDONLY) for name in _NAMESPACES]
    child = os.fork()
    if child:
        for each in namespaces:
            os.close(each)
        return child
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        enter(namespaces)
        # Only a process's children are in the pid namespace that it has entered.
        below = os.fork()
        if below:
            _, outcome = os.waitpid(below, 0)
            os._exit(os.WEXITSTATUS(outcome) if os.WIFEXITED(outcome) else 1)
        os.chdir(folder)
        become(user, group, groups)
        os.execvpe(process.interpreter, command, environment)
    except OSError as error:
        say(3, f"process {process.pid} can't be joined: {error}")
    finally:
        os._exit(1)


def attempt(processes: list[DaskProcess], seconds: float) -> list[int]:
    """Run retire.py beside each process, and return the exit statuses."""
    until = time.monotonic() + seconds
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    running = []
    for process in processes:
        output, child = Output(), 0
        try:
            argument = {
                "seconds": seconds,
                "addresses": sorted({*addresses(process.pid), *addresses(os.getpid())}),
                "boot": boot,
                "spec": process.kind == "spec",
                "words": process.words,
            }
            child = start(process, json.dumps(argument), output.write)
        except OSError as error:  # it has just ended
            say(6, f"process {process.pid} can't be read: {error}")
        os.close(output.write)
        running.append((child, output))
    statuses = []
    for child, _ in running:
        if not child:
            statuses.append(1)
        while child:
            pid, outcome = os.waitpid(child, os.WNOHANG)
            for _, each in running:
                each.log()
            if pid:
                statuses.append(os.WEXITSTATUS(outcome) if os.WIFEXITED(outcome) else 1)
                break
            if time.monotonic() > until + GRACE:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.1)
    for _, output in running:
        os.close(output.end)
    return statuses


def retired(processes: list[DaskProcess], until: float) -> list[int]:
    """Retire the workers of each process, a few at a time, and return the exit statuses."""
    statuses: list[int] = []
    while len(statuses) < len(processes):
        left = processes[len(statuses) :]
        # A scheduler that does not answer must not take the time of the others.
        share = (until - time.monotonic()) / -(-len(left) // AT_ONCE)
        statuses += attempt(left[:AT_ONCE], share)
    return statuses


def main(seconds: float) -> int:
    """Retire the workers, and return the exit status."""
    until = time.monotonic() + seconds
    done = False
    staying: set[int] = set()
    while True:
        found = [process for process in dask_processes() if process.pid not in staying]
        for process in found:
            if process.kind == "scheduler":
                staying.add(process.pid)
                say(
                    4,
                    f"the scheduler of process {process.pid} can't be moved: "
                    "its cluster ends with this machine",
                )
        found = [process for process in found if process.pid not in staying]
        if not found:
            if not done and not staying:
                say(5, "no process of Dask was recognized on this machine")
                return NO_DASK
            return SCHEDULER_IS_HERE if staying and not done else 0
        statuses = dict(zip((process.pid for process in found), retired(found, until)))
        # A worker may have advertised an address that is not known as this machine's.
        closing = {pid for pid, status in statuses.items() if status == 0}
        staying |= {pid for pid, status in statuses.items() if status == SCHEDULER_IS_HERE}
        last = min(until, time.monotonic() + CLOSE)
        while closing & {process.pid for process in dask_processes()} and time.monotonic() < last:
            time.sleep(0.5)
        left = sorted({process.pid for process in dask_processes()} - staying)
        done = done or bool(closing - set(left))
        if left and until - time.monotonic() < GRACE:
            say(3, f"still running here: Dask's process {', '.join(map(str, left))}")
            return 1
        if left:
            time.sleep(GRACE)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))

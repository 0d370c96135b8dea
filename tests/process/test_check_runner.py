"""The adapter with real pytest and testinfra on an ssh that answers from files: what must never pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from pydantic import TypeAdapter

from ami_builder.checks.login_times import AT_REST, LoginTimes
from ami_builder.checks.machine_state import ANSWERS, Sections, sections
from ami_builder.core.errors import UsageError
from ami_builder.core.options import Datasource, Role
from ami_builder.core.records import CheckResult, Outcome, Verdict, outcome_of
from ami_builder.core.units import Reserve
from ami_builder.qemu.machine import MachineDied
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner
from tests import fake_programs as programs
from tests.unit.test_checks_memory_pressure import later

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT = runner.Context(
    nonce="5ecret",
    machine="2 GiB",
    machine_memory=2 << 30,
    disk=10 << 30,
    reserve=Reserve(),
    headroom=0,
    datasource=Datasource.EC2,
    role=Role.LOCAL,
    workers=1,
    user="admin",
    public_key="ssh-ed25519 AAAA x",
    timeout=30,
)

PRESSED = json.loads((Path(__file__).parents[1] / "recorded" / "memory_pressure.json").read_text())
"""What a machine that is well answered under memory pressure."""

# The command is the last argument; the first comment identifies each script.
SSH = """\
#!/bin/sh
echo "$@" | head -n 1 >>'{folder}/argv'
for last; do :; done
case $last in
    *'Put the Dask container'*) : >'{folder}/began'; exit 0 ;;
    *'tail -c 4 /run/ami-builder-pressure'*)
        echo "$@" | head -n 1 >>'{folder}/logins'
        began=; [ ! -e '{folder}/began' ] || began=end
        echo "0 100 $began"
        cat '{folder}/progress'
        exit
        ;;
    *'cat /run/ami-builder-pressure;'*)
        cat '{folder}/pressed'
        [ ! -e '{folder}/pressed.next' ] || mv '{folder}/pressed.next' '{folder}/pressed'
        exit
        ;;
    *'Wait until the machine has booted'*)
        echo "$last" | tail -n 1 >>'{folder}/settling'
        exec cat '{folder}/settled'
        ;;
    *'Print everything that the checks'*) exec cat '{folder}/gathered' ;;
    *'Run a Python program in the container'*) : >'{folder}/asked'; exec cat '{folder}/probed' ;;
    *) exec sh -c "$last" ;;
esac
"""


SETTLED = ("nonce", "settled", "identity", "container", "memory.stat")


class Fake:
    """A machine that is an ssh on PATH, and the results of checks on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.evidence = folder.parent / "evidence"
        self.seen: list[CheckResult] = []
        self.progress: list[str] = []
        self.ready_after: list[int] = []
        """How many results there were each time that Dask was said to answer."""
        recorded = json.loads((Path(__file__).parents[1] / "recorded" / "healthy.json").read_text())
        recorded |= {"nonce": CONTEXT.nonce, "stderr": ""}
        (folder / "ssh_config").write_text("Host dask-vm\n")
        self.settled(recorded)
        self.answer("gathered", {name: text for name, text in recorded.items() if name != "nonce"})
        (folder / "probed").write_text('{"workers": []}\n')
        (folder / "progress").write_text("spilling 1.1 of 2.0 GiB\n")
        self.pressure()

    def settled(self, recorded: dict[str, str]) -> None:
        self.answer(
            "settled",
            {n: recorded[n] for n in recorded if n in SETTLED},
        )

    def pressure(self, name: str = "pressed", **changed: str) -> None:
        """Answer under memory pressure as a machine that is well, but for what is changed."""
        self.answer(name, {n: text for n, text in (PRESSED | changed).items() if n != "watched"})

    def answer(self, name: str, sections: dict[str, str]) -> None:
        (self.folder / name).write_text("".join(f"\n\036{n}\n{text}" for n, text in sections.items()))

    def file(self, content: str, name: str = "test_own.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(content))
        return path

    def run(
        self,
        *files: Path,
        host: str = "dask-vm",
        phase: str = "boot",
        context: runner.Context = CONTEXT,
        timeout: float = 60,
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[CheckResult, ...]:
        return runner.run(
            files=files,
            ssh_config=self.folder / "ssh_config",
            host=host,
            phase=phase,
            context=context,
            directory=self.evidence,
            timeout=timeout,
            alive=alive,
            on_result=self.seen.append,
            on_ready=lambda: self.ready_after.append(len(self.seen)),
            on_progress=self.progress.append,
        )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    ssh = folder / "ssh"
    ssh.write_text(SSH.format(folder=folder))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return Fake(folder)


def verdict(results: tuple[CheckResult, ...]) -> Verdict:
    return Verdict(digest="", checks_digest="", results=results, measured=())


def guard(results: tuple[CheckResult, ...]) -> str:
    """Return the one guard that failed, with its message."""
    assert not verdict(results).passed
    guards = [f"{r.name}: {r.message}" for r in results if r.name.startswith("guard: ")]
    assert len(guards) == 1, results
    return guards[0].removeprefix("guard: ")


GOOD = """\
    def test_it_is_there(host):
        assert host.run("echo hello").stdout == "hello\\n"
    """


def test_it_is_told_once_that_dask_answers_before_the_first_check(fake: Fake) -> None:
    assert verdict(fake.run(fake.file(GOOD))).passed
    assert fake.ready_after == [0]


@pytest.mark.parametrize(
    "answer",
    [
        {"nonce": CONTEXT.nonce, "settled": "dask.service has failed\n", "memory.stat": ""},
        {"nonce": "another", "settled": f"{ANSWERS}\n", "memory.stat": ""},
        {"nonce": CONTEXT.nonce},
    ],
    ids=["failed", "another machine", "cut off"],
)
def test_nobody_is_told_of_a_dask_that_does_not_answer(fake: Fake, answer: dict[str, str]) -> None:
    fake.settled(answer)
    fake.run(fake.file(GOOD))
    assert fake.ready_after == []


def listing(*workers: str, status: str = "200 OK") -> str:
    """Answer as the scheduler does at /json/identity.json."""
    listed = {f"tcp://127.0.0.1:{n}": {"type": "Worker", "id": worker} for n, worker in enumerate(workers)}
    told = json.dumps({"type": "Scheduler", "id": "Scheduler-1", "workers": listed})
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n\r\n{told}"


ACTIVE = "ActiveState=active\nNRestarts=0\nJob=\nExecMainPID=812\n"


class Settling:
    """wait_for_dask.sh with fake programs, of which `timeout` stands for bash's question as well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers(listing("a"))
        self.service(ACTIVE)
        programs.fake(folder, "timeout", f"[ $2 = bash ] || exit 0\n{self.next('answer')}")
        shown = self.next("service")
        programs.fake(folder, "systemctl", f"if [ $1 = show ]; then {shown}; else echo running; fi")
        programs.fake(folder, "docker", "")
        programs.fake(folder, "sleep", "")

    def next(self, name: str) -> str:
        """Shell text that prints the file `name`, and has the next one take its place."""
        file = self.folder / name
        return (
            f"cat {file}; [ ! -e {file}.1 ] || mv {file}.1 {file}; [ ! -e {file}.2 ] || mv {file}.2 {file}.1"
        )

    def answers(self, *texts: str) -> None:
        self._write("answer", texts)

    def service(self, *texts: str) -> None:
        self._write("service", texts)

    def _write(self, name: str, texts: tuple[str, ...]) -> None:
        for number, text in enumerate(texts):
            # Not write_text: what HTTP ends its lines with is part of it.
            (self.folder / (f"{name}.{number}" if number else name)).write_bytes(text.encode())

    def run(self, least: int = 1, seconds: int = 60, nonce: str = "") -> Sections:
        script = Path(runner.__file__).parents[1] / "checks" / "wait_for_dask.sh"
        done = subprocess.run(
            ["sh", script, nonce, str(seconds), str(least)],
            env={"PATH": f"{self.folder}:{os.environ['PATH']}"},
            capture_output=True,
            check=True,
        )
        assert done.stderr == b""
        return sections(done.stdout.decode())

    @property
    def asked(self) -> list[str]:
        """What was asked for, each time."""
        told = programs.calls(self.folder, "timeout")
        return [line.rpartition(" ")[2] for line in told if "/dev/tcp/" in line]


@pytest.fixture
def settling(tmp_path: Path) -> Settling:
    return Settling(tmp_path)


@pytest.mark.parametrize(
    ("answer", "service", "reason"),
    [
        (listing("a"), ACTIVE, ANSWERS),
        ("", "ActiveState=failed\n", "dask.service has failed"),
        ("HTTP/1.0 503 x", "ActiveState=inactive\n", "dask.service was never started"),
        (
            "",
            "ActiveState=inactive\nExecMainPID=812\n",
            "dask.service has ended without an error",
        ),
        ("", "ActiveState=activating\nNRestarts=3\n", "dask.service was restarted 3 times"),
        (listing(), "ActiveState=failed\n", "dask.service has failed"),
    ],
    ids=["answers", "failed", "never started", "ended", "restarts", "failed with a scheduler"],
)
def test_how_settle_ends(settling: Settling, answer: str, service: str, reason: str) -> None:
    settling.answers(answer)
    settling.service(service)
    found = settling.run()
    assert found["settled"].strip() == reason
    assert found["identity"].rstrip("\n") == answer
    assert settling.asked == ["/json/identity.json"]


def test_settle_waits_for_the_workers(settling: Settling) -> None:
    """A scheduler answers long before its workers are there."""
    settling.answers("", listing("a"), listing("a", "b"))
    found = settling.run(least=2)
    assert found["settled"].strip() == ANSWERS
    assert found["identity"].rstrip("\n") == listing("a", "b")
    assert len(settling.asked) == 3


@pytest.mark.parametrize(("least", "workers"), [(0, ()), (1, ("a",)), (2, ("a", "b", "c"))])
def test_settle_waits_no_longer_than_for_those(
    settling: Settling, least: int, workers: tuple[str, ...]
) -> None:
    settling.answers(listing(*workers))
    assert settling.run(least)["settled"].strip() == ANSWERS
    assert len(settling.asked) == 1


@pytest.mark.parametrize(
    ("answer", "has"), [(listing("a"), 1), (listing(), 0), ("", 0), (listing("a", "b", status="500 x"), 0)]
)
def test_settle_says_how_many_workers_there_were_when_it_gives_up(
    settling: Settling, answer: str, has: int
) -> None:
    settling.answers(answer)
    found = settling.run(least=2, seconds=0)
    assert found["settled"].strip() == (
        f"Dask did not have 2 workers within 0 s, it has {has}; dask.service is active"
    )
    assert found["identity"].rstrip("\n") == answer


def test_settle_asks_nothing_of_another_machine(settling: Settling) -> None:
    assert list(settling.run(nonce="another")) == ["nonce"]
    assert settling.asked == []


def test_results_come_as_they_are_made(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        def test_it_is_there(host):
            assert host.run("echo hello").stdout == "hello\\n"

        def test_two_is_one():
            assert 2 == 1, "2 here, 1 there"

        def test_memory(machine, variable):
            assert 0 < variable < machine.meminfo["MemTotal"]

        @pytest.mark.skip(reason="no GPU here")
        def test_gpu():
            pass
        """
    )
    results = fake.run(own)
    assert [(r.name, r.outcome, r.message) for r in results] == [
        ("own: it is there", Outcome.PASSED, ""),
        ("own: two is one", Outcome.FAILED, "2 here, 1 there"),
        ("own: memory", Outcome.PASSED, ""),
        ("own: gpu", Outcome.SKIPPED, "no GPU here"),
    ]
    assert {(r.phase, r.machine) for r in results} == {("boot", "2 GiB")}
    assert tuple(fake.seen) == results
    junit = ElementTree.parse(fake.evidence / "junit-boot.xml").getroot().find("testsuite")
    assert junit is not None
    assert (junit.get("tests"), junit.get("failures"), junit.get("skipped")) == ("4", "1", "1")
    assert "2 here, 1 there" in (fake.evidence / "checks-boot.log").read_text()
    assert "MemAvailable" in json.loads((fake.evidence / "machine-boot.json").read_text())["meminfo"]


def test_our_own_checks_run(fake: Fake) -> None:
    results = fake.run(*runner.shipped(checks_dir()))
    names = [r.name for r in results]
    assert "memory limit chain: docker has the variable" in names
    assert "first boot: host keys are new" in names
    # What needs Dask's client, which takes longest, comes last.
    assert set(names[-3:]) == {
        "memory limit chain: workers confirm what the scheduler lists",
        "container: workers spill before they are restarted",
        "service: dask answers its client",
    }
    assert verdict(results).outcome is Outcome.FAILED, "the client was told of no workers"
    told = {r.name for r in results if r.outcome is Outcome.FAILED}
    assert {
        "memory limit chain: workers share the variable",
        "service: the scheduler lists its workers",
    }.isdisjoint(told)


def test_the_client_is_asked_on_the_first_boot_alone(fake: Fake) -> None:
    names = {r.name for r in fake.run(*runner.shipped(checks_dir()))}
    assert (fake.folder / "asked").exists()
    assert {path.name for path in fake.evidence.glob("*-boot.json")} == {
        "machine-boot.json",
        "client-boot.json",
    }
    assert json.loads((fake.evidence / "client-boot.json").read_text())["stdout"] == '{"workers": []}\n'
    (fake.folder / "asked").unlink()
    for phase in ("restart", "reboot"):
        later = {r.name for r in fake.run(*runner.shipped(checks_dir()), phase=phase)}
        assert {path.name for path in fake.evidence.glob(f"*-{phase}.json")} == {f"machine-{phase}.json"}
        assert names - later >= {
            "memory limit chain: workers confirm what the scheduler lists",
            "container: workers spill before they are restarted",
            "service: dask answers its client",
        }
        assert later >= {
            "memory limit chain: workers share the variable",
            "container: workers manage memory",
            "container: spill is on disk",
            "service: all workers are there",
            "service: the scheduler lists its workers",
        }
    assert not (fake.folder / "asked").exists()


@pytest.mark.parametrize("phase", ["restart", "reboot"])
def test_a_check_that_asks_the_workers_after_the_first_boot_says_why_it_cannot(
    fake: Fake, phase: str
) -> None:
    own = fake.file("def test_a(workers):\n    pass\n")
    (result,) = fake.run(own, phase=phase)
    assert result.outcome is Outcome.FAILED
    assert f"in the phase {phase} this is not read" in result.message


@pytest.mark.parametrize(
    ("role", "workers", "least"),
    [(Role.LOCAL, 1, 1), (Role.LOCAL, 3, 3), (Role.LOCAL, 0, 1), (Role.SCHEDULER, 0, 0)],
)
def test_dask_answers_when_so_many_workers_are_there(
    fake: Fake, role: Role, workers: int, least: int
) -> None:
    fake.run(fake.file(GOOD), context=replace(CONTEXT, role=role, workers=workers))
    assert (fake.folder / "settling").read_text().split()[-3:] == [CONTEXT.nonce, "30", str(least)]


def test_a_first_boot_is_checked_once(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        @pytest.mark.first_boot
        def test_first():
            pass

        def test_always():
            pass
        """
    )
    assert [r.name for r in fake.run(own, phase="boot")] == ["own: first", "own: always"]
    assert [r.name for r in fake.run(own, phase="reboot")] == ["own: always"]
    assert (fake.evidence / "junit-reboot.xml").exists()


def test_under_pressure_only_the_checks_of_that_run(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        @pytest.mark.pressure
        def test_restarts(pressure, note):
            note(f"{len(pressure.kills)} kills")

        def test_always():
            pass
        """
    )
    results = fake.run(*runner.shipped(checks_dir()), own, phase="pressure")
    assert verdict(results).passed, results
    assert {r.name.split(":")[0] for r in results} == {"memory pressure", "own"}
    kills = PRESSED["kernel"].count("oom-kill:")
    assert {r.name: r.message for r in results}["own: restarts"] == f"{kills} kills"
    assert [r.name for r in fake.run(own, phase="restart")] == ["own: always"]
    logins = (fake.folder / "logins").read_text().splitlines()
    assert all("-o ControlPath=none" in line for line in logins), "a shared connection needs no sshd"
    told = json.loads((fake.evidence / "pressed-pressure.json").read_text())
    watched = TypeAdapter(LoginTimes).validate_python(told["watched"])
    assert (len(watched.rest), len(watched.logins)) == (AT_REST, 1)
    assert len(logins) == AT_REST + 1
    assert watched.ended
    assert not [login for login in (*watched.rest, *watched.logins) if login.failed]


def test_what_goes_on_under_pressure_is_reported(fake: Fake) -> None:
    fake.run(*runner.shipped(checks_dir()), phase="pressure")
    assert fake.progress[0] == "logins at rest"
    assert set(fake.progress[1:]) == {"spilling 1.1 of 2.0 GiB"}
    fake.progress.clear()
    (fake.folder / "progress").write_text("")
    fake.run(*runner.shipped(checks_dir()), phase="pressure")
    assert fake.progress == ["logins at rest"]


def test_it_is_tried_again_once_when_the_kernel_killed_a_second_one(fake: Fake) -> None:
    """The scheduler, 90 ms after the worker: nothing that an image can help."""
    clock, worker, *_ = PRESSED["kernel"].splitlines()
    assert "task=python" in worker
    scheduler = later(worker, 0.09).replace("task=python", "task=dask")
    kernel = f"{clock}\n{worker}\n{scheduler}\n"
    raced = {"kernel": kernel, "dask": "", "client": "", "container.after": "another"}
    fake.pressure(**raced)
    # Whoever looks at the machine a second time finds it as it should be.
    fake.pressure("pressed.next")
    results = {r.name: r for r in fake.run(*runner.shipped(checks_dir()), phase="pressure")}
    assert verdict(tuple(results.values())).passed, results
    assert fake.progress.count("logins at rest") == 2
    why = "the kernel killed dask 0.09 s after python, in the container"
    assert (
        results["memory pressure: all steps completed"].message == f"at the second try; at the first, {why}"
    )
    assert {path.name for path in fake.evidence.glob("pressed*")} == {
        "pressed-pressure.json",
        "pressed-again-pressure.json",
    }
    fake.pressure(**raced)
    again = {r.name: r for r in fake.run(*runner.shipped(checks_dir()), phase="pressure")}
    steps = again["memory pressure: all steps completed"]
    assert steps.outcome is Outcome.FAILED
    assert (
        steps.message
        == f"the steps under memory pressure did not complete: it reported no result; {why}; {why}"
    )


def test_a_machine_that_never_ends_under_pressure_is_not_judged(fake: Fake) -> None:
    fake.answer("pressed", {"memcg": "/a", "client": ""})
    own = fake.file("import pytest\n\n@pytest.mark.pressure\ndef test_a(pressure):\n    pass\n")
    told = guard(fake.run(own, phase="pressure"))
    assert told.startswith(
        "the machine answers: the script under memory pressure did not end; its last section is: client"
    )


def test_what_a_phase_does_not_ask_for_is_not_there(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        @pytest.mark.pressure
        def test_a(machine):
            pass

        def test_b(pressure):
            pass
        """
    )
    for phase, name in (("pressure", "a"), ("boot", "b")):
        (result,) = fake.run(own, phase=phase)
        assert (result.name, result.outcome) == (f"own: {name}", Outcome.FAILED)
        assert "the phase" in result.message


def test_checks_of_a_first_boot_alone_are_none_after_a_reboot(fake: Fake) -> None:
    own = fake.file("import pytest\n\n@pytest.mark.first_boot\ndef test_first():\n    pass\n")
    assert "checks were found" in guard(fake.run(own, phase="reboot"))


def test_this_machine_is_refused(fake: Fake) -> None:
    results = fake.run(fake.file(GOOD), host="local://")
    assert "checks run on the booted machine: --hosts=local:// is not ssh://NAME" in guard(results)


@pytest.mark.parametrize("host", ["paramiko://dask-vm", "docker://dask", "ssh"])
def test_only_ssh_will_do(fake: Fake, host: str) -> None:
    if host == "ssh":
        assert verdict(fake.run(fake.file(GOOD), host=host)).passed
    else:
        assert "is not ssh://NAME" in guard(fake.run(fake.file(GOOD), host=host))


@pytest.mark.parametrize("nonce", ["another", ""])
def test_another_machine_is_refused(fake: Fake, nonce: str) -> None:
    fake.settled({"nonce": nonce})
    assert "the machine is the one that was booted: its nonce should be 5ecret" in guard(
        fake.run(fake.file(GOOD))
    )


def test_no_nonce_to_ask_for_is_refused(fake: Fake) -> None:
    fake.settled({"nonce": ""})
    results = fake.run(fake.file(GOOD), context=replace(CONTEXT, nonce=""))
    assert "the machine is the one that was booted" in guard(results)


def test_unreachable_machine_is_named(fake: Fake) -> None:
    (fake.folder / "ssh").write_text("#!/bin/sh\necho 'Connection refused' >&2\nexit 255\n")
    assert "ssh failed: Connection refused" in guard(fake.run(fake.file(GOOD)))


# What a busy host in CI answered once.
BAD_HOST = """\
import errno
import subprocess

class Refused(subprocess.Popen):
    left = {times}

    def __init__(self, *args, **kwargs):
        if Refused.left:
            Refused.left -= 1
            raise OSError(errno.EFAULT, "Bad address", "/bin/sh")
        super().__init__(*args, **kwargs)

subprocess.Popen = Refused

def test_a(machine):
    assert machine
"""


def test_a_host_that_cannot_start_ssh_for_a_moment_is_no_fault_of_the_machine(fake: Fake) -> None:
    (result,) = fake.run(fake.file(BAD_HOST.format(times=2)))
    assert result.outcome is Outcome.PASSED, result


def test_a_host_that_cannot_start_ssh_is_named(fake: Fake) -> None:
    now = "from ami_builder.system import processes\nprocesses._START_AGAIN_SECONDS = (0.0,)\n"
    (result,) = fake.run(fake.file(now + BAD_HOST.format(times=9)))
    assert result.name == "guard: this host can run the checks"
    assert (result.outcome, result.message) == (Outcome.INCONCLUSIVE, "[Errno 14] Bad address: '/bin/sh'")


@pytest.mark.parametrize("passes", [True, False])
def test_a_host_that_kills_the_checks_is_no_fault_of_the_machine(fake: Fake, passes: bool) -> None:
    text = f"""\
        import os
        import signal

        def test_a():
            assert {passes}

        def test_b(request):
            request.config.pluginmanager.get_plugin("ami-builder-run").events.write('{{"event": "res')
            request.config.pluginmanager.get_plugin("ami-builder-run").events.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """
    results = fake.run(fake.file(text))
    (result,) = [one for one in results if one.name.startswith("guard: ")]
    assert (result.name, result.outcome) == ("guard: this host can run the checks", Outcome.INCONCLUSIVE)
    assert result.message == "pytest was killed (SIGKILL) after 1 of 2 checks"
    assert outcome_of(results) is (Outcome.INCONCLUSIVE if passes else Outcome.FAILED)


def test_a_login_without_sudo_is_named(fake: Fake) -> None:
    (fake.folder / "ssh").write_text("#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    assert "failed on the machine (status 1): sudo: a password is required" in guard(
        fake.run(fake.file(GOOD))
    )


def test_half_an_answer_is_refused(fake: Fake) -> None:
    fake.answer("gathered", {"booted": "1\n"})
    assert "the machine answers" in guard(fake.run(fake.file("def test_a(machine):\n    pass\n")))


def test_missing_file_is_a_usage_error(fake: Fake) -> None:
    with pytest.raises(UsageError, match=r"there are no checks at .*gone\.py"):
        fake.run(fake.folder / "gone.py")


def test_no_files_are_no_pass(fake: Fake) -> None:
    assert not verdict(fake.run()).passed


@pytest.mark.parametrize("content", ["", "def helper():\n    pass\n"])
def test_a_file_without_checks_is_refused(fake: Fake, content: str) -> None:
    results = fake.run(fake.file(GOOD), fake.file(content, name="test_none.py"))
    assert "every file has checks: none in" in guard(results)


def test_all_skipped_is_no_pass(fake: Fake) -> None:
    own = fake.file("import pytest\n\n@pytest.mark.skip(reason='no')\ndef test_a():\n    pass\n")
    assert "not all checks were skipped: all 1 were" in guard(fake.run(own))


def test_blocked_without_a_reason_is_no_pass(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        def test_a():
            pytest.skip("blocked: by nothing")

        def test_b():
            pass
        """
    )
    assert "nothing is blocked without a failure: own: a: blocked: by nothing" in guard(fake.run(own))


def test_a_check_that_the_host_was_too_busy_for_is_inconclusive(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest
        from ami_builder.checks.plugin import INCONCLUSIVE

        @pytest.fixture
        def control():
            pytest.skip(f"{INCONCLUSIVE}3 s of CPU steal")

        def test_a():
            pytest.skip(f"{INCONCLUSIVE}a login at rest takes 40 s")

        def test_b(control):
            pass

        def test_c():
            pass
        """
    )
    results = fake.run(own)
    assert [(r.name, r.outcome, r.message) for r in results] == [
        ("own: a", Outcome.INCONCLUSIVE, "a login at rest takes 40 s"),
        ("own: b", Outcome.INCONCLUSIVE, "3 s of CPU steal"),
        ("own: c", Outcome.PASSED, ""),
    ]
    assert verdict(results).inconclusive


@pytest.mark.parametrize(
    ("last", "outcome"),
    [("pass", Outcome.INCONCLUSIVE), ("assert False", Outcome.FAILED)],
    ids=["inconclusive", "failed"],
)
def test_what_is_inconclusive_may_block_others_and_hides_no_failure(
    fake: Fake, last: str, outcome: Outcome
) -> None:
    own = fake.file(
        f"""\
        import pytest

        def test_a():
            pytest.skip("inconclusive: the host is busy")

        def test_b():
            pytest.skip("blocked: by a")

        def test_c():
            {last}
        """
    )
    results = fake.run(own)
    assert verdict(results).outcome is outcome
    assert not [r for r in results if r.name.startswith("guard:")]


def test_nothing_but_inconclusive_checks_is_inconclusive(fake: Fake) -> None:
    own = fake.file(
        """\
        import pytest

        def test_a():
            pytest.skip("inconclusive: the host is busy")

        def test_b():
            pytest.skip("no GPU here")
        """
    )
    results = fake.run(own)
    assert [r.outcome for r in results] == [Outcome.INCONCLUSIVE, Outcome.SKIPPED]
    assert verdict(results).inconclusive


def test_an_inconclusive_check_hides_no_pytest_that_dies(fake: Fake) -> None:
    own = fake.file(
        """\
        import os, pytest

        def test_a():
            pytest.skip("inconclusive: the host is busy")

        def test_b():
            os._exit(0)
        """
    )
    assert "the checks ran to the end: 1 of 2 checks were run" in guard(fake.run(own))


@pytest.mark.parametrize(
    ("content", "error"),
    [("def test_a(:\n", "SyntaxError"), ("import nothing_like_it\n", "ModuleNotFoundError")],
)
def test_a_file_that_cannot_be_read_is_named(fake: Fake, content: str, error: str) -> None:
    results = fake.run(fake.file(GOOD), fake.file(content, name="test_bad.py"))
    assert error in guard(results)


def test_unknown_marks_are_refused(fake: Fake) -> None:
    own = fake.file("import pytest\n\n@pytest.mark.firstboot\ndef test_a():\n    pass\n")
    assert "firstboot" in guard(fake.run(own))


def test_expected_failures_prove_nothing(fake: Fake) -> None:
    own = fake.file("import pytest\n\n@pytest.mark.xfail\ndef test_a():\n    assert False\n")
    assert [r.outcome for r in fake.run(own)] == [Outcome.FAILED]


@pytest.mark.parametrize("when", ["setup", "teardown"])
def test_broken_fixtures_fail(fake: Fake, when: str) -> None:
    own = fake.file(
        f"""\
        import pytest

        @pytest.fixture
        def broken():
            assert {when == "teardown"}, "broken before"
            yield
            assert False, "broken after"

        def test_a(broken):
            pass
        """
    )
    results = fake.run(own)
    assert [r.message for r in results if r.outcome is Outcome.FAILED] == [
        f"broken {'before' if when == 'setup' else 'after'}"
    ]


def test_pytest_that_dies_is_no_pass(fake: Fake) -> None:
    own = fake.file("import os\n\ndef test_a():\n    pass\n\ndef test_b():\n    os._exit(0)\n")
    assert "the checks ran to the end" in guard(fake.run(own))


def test_pytest_that_hangs_is_stopped(fake: Fake) -> None:
    began = time.monotonic()
    fake.run(fake.file("def test_a():\n    pass\n"))
    enough = max(5, round(4 * (time.monotonic() - began)))
    own = fake.file("import time\n\ndef test_a():\n    pass\n\ndef test_b():\n    time.sleep(600)\n")
    results = fake.run(own, context=replace(CONTEXT, timeout=0), timeout=enough)
    assert f"1 of 2 checks were run: stopped after {enough} s" in guard(results)


def test_a_machine_that_is_gone_ends_it_at_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_ALIVE_SECONDS", 0.1)
    own = fake.file("import time\n\ndef test_a():\n    pass\n\ndef test_b():\n    time.sleep(60)\n")

    def alive() -> None:
        if fake.seen:
            raise MachineDied("the guest's kernel panicked")

    with pytest.raises(MachineDied, match="panicked"):
        fake.run(own, alive=alive)
    assert [result.name for result in fake.seen] == ["own: a"]


def test_own_settings_of_a_folder_have_no_say(fake: Fake) -> None:
    (fake.folder / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
    (fake.folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '-k nothing'\n")
    assert verdict(fake.run(fake.file(GOOD))).passed


def test_a_conftest_cannot_take_checks_away_unseen(fake: Fake) -> None:
    (fake.folder / "conftest.py").write_text("def pytest_collection_modifyitems(items):\n    items.clear()\n")
    assert "none in" in guard(fake.run(fake.file(GOOD)))


def test_digest_follows_content(tmp_path: Path) -> None:
    own = tmp_path / "test_own.py"
    own.write_text("def test_a(): pass\n")
    first = runner.digest([own])
    assert runner.digest([own]) == first
    assert runner.digest([]) != first
    own.write_text("def test_b(): pass\n")
    assert runner.digest([own]) != first
    changed = runner.digest([own])
    (tmp_path / "conftest.py").write_text("x = 1\n")
    assert runner.digest([own]) != changed
    with pytest.raises(UsageError, match=r"gone\.py can't be read"):
        runner.digest([tmp_path / "gone.py"])


def test_context_crosses_unharmed(tmp_path: Path) -> None:
    context = replace(
        CONTEXT, reserve=Reserve(bytes=5, percent=2.5, capped=True), phase="reboot", emulator=4711
    )
    context.write(tmp_path / "context.json")
    assert runner.Context.read(tmp_path / "context.json") == context
    assert (tmp_path / "context.json").stat().st_mode & 0o077 == 0


def test_by_hand_without_a_context_is_refused(tmp_path: Path) -> None:
    done = by_hand(tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 64
    assert "AMI_BUILDER_CHECKS_CONTEXT does not name the file" in done.stdout


def test_by_hand_beside_testinfras_own_plugin_is_refused(tmp_path: Path) -> None:
    done = by_hand(tmp_path)
    assert done.returncode != 0
    assert "passed" not in done.stdout


def by_hand(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = folder / "test_own.py"
    own.write_text("def test_a(host):\n    pass\n")
    argv = [sys.executable, "-m", "pytest", "-p", "ami_builder.checks.plugin", "-c", "/dev/null", str(own)]
    root, env = Path(runner.__file__).parents[2], {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(argv, cwd=root, env=env, capture_output=True, text=True, check=False)


def test_what_a_check_is_doing_is_reported_while_it_runs(fake: Fake) -> None:
    check = """\
        import json
        import os

        def test_it_spills(host, request):
            for text in ("spilling 1.1 of 2.0 GiB", "spilling 2.0 of 2.0 GiB"):
                event = {"event": "progress", "text": text}
                os.write(request.config.getoption("events"), json.dumps(event).encode() + b"\\n")
    """
    results = fake.run(fake.file(check))
    assert verdict(results).passed
    assert fake.progress == ["spilling 1.1 of 2.0 GiB", "spilling 2.0 of 2.0 GiB"]
    assert len(results) == 1, "it is no result"

"""The benchmarks that take hours: what they plan, read and print, with stand-ins for builds and QEMU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.errors import UsageError
from tests.benchmarks import against, cgroups, host, layering, slow_host, slowdown, spilling, without_limit
from tests.benchmarks.against import Kind, Phase, Side
from tests.benchmarks.slow_host import Job, Outcome, Subject
from tests.benchmarks.slowdown import Slowdown
from tests.experiment.cases import Case, LimitPolicy, Work
from tests.experiment.tasks import Memory, tasks
from tests.vm.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MIB = 1 << 20
ZERO = 1_750_000_000.0
STARTED = "2025-06-15T15:06:42.500000Z"
"""2.5 s later: the record begins with the step `build`, after the inputs were resolved."""

WAYS = slowdown.slowdowns(2, 2)
V1 = """
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
"""
V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n"


def allowed() -> bool:
    """Tell whether this process may make a cgroup."""
    try:
        with cgroups.group("cpu"), cgroups.group("cpuacct"):
            return True
    except cgroups.NoGroup:
        return False


needs_cgroup = pytest.mark.skipif(not allowed(), reason="needs root, and a host that allows cgroups")


@pytest.mark.parametrize(
    ("mounts", "cpu", "cpuacct"),
    [
        (V1, ("/sys/fs/cgroup/cpu,cpuacct", 1), ("/sys/fs/cgroup/cpu,cpuacct", 1)),
        (V2, ("/sys/fs/cgroup", 2), ("/sys/fs/cgroup", 2)),
        ("x /u cgroup2 rw 0 0\nx /c cgroup rw,cpu 0 0\n", ("/c", 1), ("/u", 2)),
        ("proc /proc proc rw,cpu 0 0\n", None, None),
    ],
)
def test_the_hierarchy_is_found(
    mounts: str, cpu: tuple[str, int] | None, cpuacct: tuple[str, int] | None
) -> None:
    for controller, wanted in (("cpu", cpu), ("cpuacct", cpuacct)):
        found = cgroups.find(controller, mounts.strip())
        assert found == (None if wanted is None else (Path(wanted[0]), wanted[1]))


def test_a_quota_as_both_versions_write_it(tmp_path: Path) -> None:
    for version in (1, 2):
        cgroups.Group(folder=tmp_path, version=version).limit(0.5)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "cpu.max": "50000 100000",
    }


def test_cpu_time_as_both_versions_count_it(tmp_path: Path) -> None:
    (tmp_path / "cpuacct.usage").write_text("1500000000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n")
    assert [cgroups.Group(folder=tmp_path, version=v).cpu_seconds() for v in (1, 2)] == [1.5, 2.5]


def test_four_ways_to_slow_a_host_down() -> None:
    assert [(way.name, way.quota, way.loops) for way in WAYS] == [
        ("quota-half", 1.0, 0),
        ("quota-quarter", 0.5, 0),
        ("neighbour-half", None, 2),
        ("neighbour-quarter", None, 6),
    ]
    assert [str(way) for way in WAYS[::2]] == [
        "emulator limited to 1 CPU (a half)",
        "beside 2 busy loops (a half)",
    ]


def test_on_more_cpus_it_takes_more_neighbours() -> None:
    ways = slowdown.slowdowns(8, 2)
    assert [way.quota for way in ways[:2]] == [1.0, 0.5]
    # Of 16 threads on 8 CPUs each gets a half.
    assert [way.loops for way in ways[2:]] == [14, 30]


NAMES = [way.name for way in WAYS]


def test_ten_runs_are_spread_over_all_ways() -> None:
    jobs = slow_host.plan(NAMES, 10)
    good = [job.slowdown for job in jobs if job.subject is Subject.GOOD]
    assert [good.count(name) for name in NAMES] == [3, 3, 2, 2]
    assert [job.slowdown for job in jobs if job.subject is Subject.UNLIMITED] == NAMES
    assert len(set(jobs)) == len(jobs)


def test_the_first_round_has_everything() -> None:
    first = slow_host.plan(NAMES, 10, 2)[:8]
    assert {(job.slowdown, job.subject) for job in first} == {
        (name, subject) for name in NAMES for subject in Subject
    }
    assert {job.number for job in first} == {1}


def test_one_way_alone() -> None:
    assert slow_host.plan(["quota-half"], 2, 0) == [
        Job(slowdown="quota-half", subject=Subject.GOOD, number=number) for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("message", "longest", "at_rest"),
    [
        ("longest wait for a login 12 s, 5 s at rest: 2.4 x, allowed 5 x or 10 s", 12, 5),
        ("longest wait for a login 12.3 s, 4.5 s at rest: 2.7 x", 12.3, 4.5),
        ("31 logins, 3.4 s between two at most", 3.4, None),
        ("no login for 12 s, 35 s in all, 0 failed", 12, None),
        ("a login at rest takes 40 s", None, 40),
        ("1.9 GiB of work (1.3 x the limit) in 12 s", None, None),
    ],
)
def test_waits_for_logins_are_read(message: str, longest: float | None, at_rest: float | None) -> None:
    assert slow_host.waits(["2 checks", message]) == (longest, at_rest)


def run(**changes: Any) -> slow_host.Run:
    """Return one verification, green by default."""
    made = slow_host.Run(
        slowdown="quota-half",
        title="emulator limited to 1 CPU (a half)",
        subject=Subject.GOOD,
        number=1,
        outcome=Outcome.PASSED,
        status=0,
        error="",
        not_passed=(),
        wall=600.0,
        longest=12.0,
        at_rest=5.0,
        second_try=False,
        wait_share=0.5,
        emulator_seconds=500.0,
        emulators=2,
        load=0.1,
        started="2025-06-15T15:06:42+00:00",
        run_id="20250615T150642Z-abcdef",
        image="ab",
        checks="cd",
        commit="4bf1c7a",
    )
    return replace(made, **changes)


RED = run(
    subject=Subject.UNLIMITED,
    outcome=Outcome.FAILED,
    status=5,
    not_passed=("memory limit chain: container has a limit (boot): memory limit 0: none", "b (boot): c"),
    wall=200.0,
    longest=None,
    at_rest=None,
)


def test_the_table_counts_right_verdicts() -> None:
    lines = list(
        slow_host.table(
            [
                run(),
                run(number=2, wall=720.0, longest=13.0, outcome=Outcome.INCONCLUSIVE, status=10),
                RED,
                run(slowdown="neighbour-half", title="beside 2 busy loops (a half)", second_try=True),
            ]
        )
    )
    assert lines[2:5] == [
        "| emulator limited to 1 CPU (a half) | 1 of 2 (1 inconclusive) | 1 of 1"
        " | 11:00 min (10:00 min to 12:00 min) | 3:20 min | 12.5 s (12.0 s to 13.0 s)"
        " | 5.0 s (5.0 s to 5.0 s) | 50% (50% to 50%) |",
        "| beside 2 busy loops (a half) | 1 of 1 | – | 10:00 min | – | 12.0 s | 5.0 s | 50% |",
        "| all | 2 of 3 (1 inconclusive) | 1 of 1 | | | | | |",
    ]
    assert "| **inconclusive** |" in lines[9]
    assert lines[10].endswith(
        "| memory limit chain: container has a limit (boot): memory limit 0: none; 1 more |"
    )
    assert lines[11].endswith("| memory pressure needed a second try |")
    assert len({line.count("|") for line in lines[6:]}) == 1


def test_a_good_image_that_is_red_is_explained_in_whole() -> None:
    bad = run(outcome=Outcome.FAILED, status=5, not_passed=("a (boot): x|y", "b (boot): c"))
    assert list(slow_host.table([bad]))[-1].endswith("| a (boot): x\\|y; b (boot): c |")


def test_runs_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    assert slow_host.read_runs(path) == []
    slow_host.append(path, run())
    with path.open("a") as file:
        file.write('{"slowdown": "quota-h')
    assert slow_host.read_runs(path) == [run()]
    slow_host.append(path, RED)
    assert slow_host.read_runs(path) == [run(), RED]


VERIFY = """#!/bin/sh
# In place of `ami-builder verify`: an emulator, a reboot, the emulator again.
set -e
for boot in 1 2; do setsid timeout -s KILL 1 "{folder}/qemu-system-x86" || true; done
mkdir -p "$AMI_BUILDER_HOME/state/runs/r"
cat >"$AMI_BUILDER_HOME/state/runs/r/record.json" <<END
{record}
END
echo "$@" >&2
exit {status}
"""
EMULATOR = """#!/bin/sh
while :; do :; done
"""


def stand_in(folder: Path, status: int, record: Mapping[str, Any]) -> Path:
    """Make a command that does as a verification does, and ends with that status and record."""
    texts = {
        "verify": VERIFY.format(folder=folder, record=json.dumps(record), status=status),
        "qemu-system-x86": EMULATOR,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "verify"


def verifier(folder: Path, command: Path, way: Slowdown) -> slow_host.Verifier:
    """Return a verifier whose command is a stand-in."""
    return slow_host.Verifier(
        home=folder / "home",
        image="ab",
        checks="cd",
        commit="4bf1c7a",
        slowdowns={way.name: way},
        command=(command,),
    )


def result(name: str, phase: str, outcome: str, message: str) -> Mapping[str, str]:
    """Return a check's result as a record has it."""
    return {"name": name, "phase": phase, "outcome": outcome, "message": message}


@needs_cgroup
def test_a_quota_holds_for_every_emulator_of_a_verification(tmp_path: Path) -> None:
    way = Slowdown(name="quota", share="a fifth", quota=0.2)
    record = {
        "run_id": "r",
        "verdict": {
            "results": [
                result("memory limit chain: a", "boot", "failed", "no limit"),
                result("b", "pressure", "passed", "longest wait for a login 12 s, 5 s at rest"),
            ]
        },
    }
    command = stand_in(tmp_path, 5, record)
    job = Job(slowdown="quota", subject=Subject.UNLIMITED, number=1)
    done = verifier(tmp_path, command, way).verify(job, tmp_path / "image.qcow2")
    assert done.outcome is Outcome.FAILED
    assert done.as_it_should
    assert done.not_passed == ("memory limit chain: a (boot): no limit",)
    assert (done.longest, done.at_rest) == (12, 5)
    assert done.run_id == "r"
    assert done.emulators == 2
    assert done.emulator_seconds < done.wall / 2
    logs = list((tmp_path / "home" / "quota" / "logs").glob("*"))
    assert logs[0].read_text().splitlines()[-1] == f"{tmp_path}/image.qcow2 --json"


@needs_cgroup
@pytest.mark.parametrize("quota", [0.2, None])
def test_what_an_emulator_waits_for_is_counted(tmp_path: Path, quota: float | None) -> None:
    way = Slowdown(name="way", share="some", quota=quota, loops=0 if quota else 2 * (os.cpu_count() or 1))
    stand_in(tmp_path, 0, {})
    with slowdown.slowed(way) as group:
        argv = ["sh", "-c", f"timeout -s KILL 1.5 {tmp_path}/qemu-system-x86; exit 7"]
        env = {"PATH": os.environ["PATH"]}
        status, usage = slowdown.run(
            argv, way, group, env=env, cwd=tmp_path, log=tmp_path / "log", emulator="qemu-system-"
        )
    assert status == 7
    assert len(usage.pids) == 1
    assert usage.wait_share > 0.3
    assert not group.folder.exists()


@needs_cgroup
def test_without_an_emulator_nothing_was_slowed_down(tmp_path: Path) -> None:
    command = stand_in(tmp_path, 0, {})
    way = Slowdown(name="way", share="all", quota=1.0)
    job = Job(slowdown="way", subject=Subject.GOOD, number=1)
    other = replace(verifier(tmp_path, command, way), emulator="another-")
    done = other.verify(job, tmp_path / "image.qcow2")
    assert done.outcome is Outcome.BROKEN
    assert not done.as_it_should


@pytest.mark.needs("mke2fs", "sfdisk", "qemu-img")
def test_the_image_without_the_limit(tmp_path: Path) -> None:
    root = tmp_path / "root"
    texts = {
        without_limit.COMPOSE_FILE: (
            "  mem_limit: ${AVAILABLE_MEMORY_FOR_DASK:-0}\n"
            "  memswap_limit: ${AVAILABLE_MEMORY_FOR_DASK:-0}\n  restart: no\n"
        ),
        without_limit.START_DASK: (
            '#!/bin/sh\nunset AVAILABLE_MEMORY_FOR_DASK\n    export AVAILABLE_MEMORY_FOR_DASK="$limit"\n'
        ),
        without_limit.DEFAULT: "# why\n[Scope]\nIPAddressDeny=169.254.169.254\n",
    }
    for name, text in texts.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if name == without_limit.START_DASK else 0o644)
    disk = disk_of(tmp_path, root)
    image, changed, raw = (tmp_path / name for name in ("good.qcow2", "bad.qcow2", "bad.raw"))
    convert(disk, image, "qcow2")
    before = image.read_bytes()
    without_limit.make(image, changed)
    convert(changed, raw, "raw")
    files = without_limit.RootFiles(raw)
    assert files.read(without_limit.COMPOSE_FILE) == "  mem_limit: 0\n  memswap_limit: 0\n  restart: no\n"
    script = texts[without_limit.START_DASK].replace("export ", "")
    assert files.read(without_limit.START_DASK) == script
    default = files.read(without_limit.DEFAULT)
    assert default == texts[without_limit.DEFAULT] + "MemoryMax=infinity\n"
    assert [files.mode(path) for path in texts] == ["0644", "0755", "0644"]
    assert image.read_bytes() == before
    assert not list(tmp_path.glob(".without-limit-*"))


def disk_of(folder: Path, root: Path) -> Path:
    """Make a disk as scripts/base-disk does: an EFI partition, and behind it the files of `root`."""
    disk = folder / "disk.raw"
    disk.touch()
    os.truncate(disk, 40 * MIB)
    offset = f"offset={5 * MIB}"
    mke2fs: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-E", offset, "-d", root]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run([*mke2fs, disk, f"{32 * 1024}k"], env=environment, check=True)
    table = "label: gpt\n15 : start=1MiB, size=4MiB, type=uefi\n1 : start=5MiB, size=32MiB\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, env=environment, check=True)
    return disk


def convert(source: Path, to: Path, kind: str) -> None:
    """Convert a disk image."""
    subprocess.run(["qemu-img", "convert", "-O", kind, source, to], check=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_limit.no_limit, "mem_limit: 1g\n"),
        (without_limit.no_export, "AVAILABLE_MEMORY_FOR_DASK=1\nexport OTHER\n"),
        (without_limit.no_default, "[Scope]\n[Unit]\nWants=a.service\n"),
    ],
)
def test_an_image_that_is_not_changed_is_no_image_without_the_limit(
    change: Callable[[str], str], text: str
) -> None:
    with pytest.raises(UsageError):
        change(text)


def test_builds_take_turns() -> None:
    assert [side for _, side in against.turns(3)] == [
        *(Side.OLD, Side.NEW),
        *(Side.NEW, Side.OLD),
        *(Side.OLD, Side.NEW),
    ]
    assert [turn for turn, _ in against.turns(2)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("began", "ended", "seconds"),
    [(0, 10, 20), (2.5, 5, 7.5), (-5, 5, 15), (5, 50, 5), (10, 10, 0)],
)
def test_cpu_time_between_two_times(began: float, ended: float, seconds: float) -> None:
    assert against.used([(0, 100), (5, 115), (5, 115), (10, 120)], began, ended) == seconds


def step(name: str, began: float, seconds: float, detail: str = "") -> Mapping[str, Any]:
    """Return a step as a record has it."""
    return {"name": name, "seconds": seconds, "status": "passed", "detail": detail, "began": began}


VM = "build dask > verify > machine of 2 GiB"
STEPS = (
    step("resolve inputs", 0, 2.4),
    step("build dask", 2.5, 400),
    step("build dask > base disk", 2.5, 50),
    step("build dask > container", 2.5, 30.0),
    step("build dask > bake with Packer", 52.5, 60.0, "500 MB"),
    step("build dask > verify", 112.5, 290),
    step(VM, 112.5, 290),
    step(f"{VM} > first boot", 112.52, 60),
    step(f"{VM} > service restart, with the image's own Compose file", 172.5, 20),
    step(f"{VM} > memory pressure", 192.5, 200, "14 checks passed; at the second try"),
)


def test_phases_are_the_innermost_steps() -> None:
    record = {"started": STARTED, "steps": STEPS}
    assert [
        (phase.name, round(phase.began - ZERO, 2), round(phase.wall, 2))
        for phase in against.phases_of(record, ZERO - 30 + 2.0)
    ] == [
        ("set-up", -28, 28),
        ("resolve inputs", 0, 2.4),
        ("base disk and container", 2.5, 50),
        ("bake with Packer", 52.5, 60),
        ("first boot", 112.52, 60),
        ("service restart", 172.5, 20),
        ("memory pressure", 192.5, 200),
    ]


def test_what_is_cached_is_no_phase() -> None:
    steps = [{**each, "detail": "cached"} if "base" in each["name"] else each for each in STEPS]
    names = [phase.name for phase in against.phases_of({"started": STARTED, "steps": steps}, ZERO)]
    assert names[2] == "container"


def test_a_run_that_ended_before_the_build_has_no_phases() -> None:
    assert against.phases_of({}, ZERO) == []
    assert against.phases_of({"started": STARTED, "steps": STEPS[:1]}, ZERO) == []


def built(side: Side, kind: Kind, turn: int, wall: float, **changes: Any) -> against.Build:
    """Return one build, whose parts take a part of its time."""
    parts = {"set-up": 0.1, "bake with Packer": 0.3, "memory pressure": 0.4, "start": 0.0001}
    phases = tuple(
        Phase(name=name, began=ZERO, ended=ZERO + part * wall, cpu=2 * part * wall)
        for name, part in parts.items()
    )
    made = against.Build(
        side=side,
        kind=kind,
        turn=turn,
        commit="4bf1c7a",
        status=0,
        wall=wall,
        cpu=2 * wall,
        cpu_waited=2 * wall,
        load=0.1,
        phases=phases,
        steps=STEPS,
        second_try=False,
        wrong=(),
    )
    return replace(made, **changes)


BUILDS: Sequence[against.Build] = (
    built(Side.OLD, Kind.COLD, 1, 1000),
    built(Side.NEW, Kind.COLD, 1, 400),
    built(Side.NEW, Kind.COLD, 2, 300),
    built(Side.OLD, Kind.COLD, 2, 1200),
    built(Side.OLD, Kind.CACHED, 1, 800),
    built(Side.NEW, Kind.CACHED, 1, 280),
)


def test_the_table_has_medians_and_ratios() -> None:
    assert list(against.table(BUILDS))[2:] == [
        "| **cold** | 18:20 min | 5:50 min | 32% | 36:40 min | 11:40 min | 32% |",
        "| **base and container cached** | 13:20 min | 4:40 min | 35% | 26:40 min | 9:20 min | 35% |",
        # Of all builds.
        "| **memory pressure** | 6:40 min | 2:00 min | 30% | 13:20 min | 4:00 min | 30% |",
        # Of cold builds alone.
        "| set-up | 110 s | 35 s | 32% | 3:40 min | 70 s | 32% |",
        "| bake with Packer | 5:00 min | 90 s | 30% | 10:00 min | 3:00 min | 30% |",
    ]


def test_without_a_cgroup_phases_have_no_cpu_time() -> None:
    phases = (Phase(name="reboot", began=ZERO, ended=ZERO + 10),)
    lines = list(against.table([replace(build, phases=phases) for build in BUILDS]))
    assert lines[-1] == "| reboot | 10 s | 10 s | 100% | – | – | – |"


def test_a_build_that_did_not_do_all_its_work_does_not_count() -> None:
    early = built(Side.NEW, Kind.COLD, 3, 1, status=4, steps=STEPS[:4], wrong=("packer failed",))
    red = built(Side.OLD, Kind.COLD, 3, 1000, status=5, wrong=("ssh (pressure): no login for 12 s",))
    assert list(against.table([*BUILDS, early])) == list(against.table(BUILDS))
    assert red.complete
    assert list(against.notes([early, red])) == [
        "new, cold, turn 3: exit status 4, it does not count: packer failed",
        "old, cold, turn 3: exit status 5, all phases ran, so it counts: ssh (pressure): no login for 12 s",
    ]


def test_what_makes_a_build_longer_is_noted() -> None:
    twice = (*STEPS, step(f"{VM} > first boot", 500, 60))
    slow = built(Side.NEW, Kind.CACHED, 2, 100, second_try=True, steps=twice, cpu_waited=150)
    assert [note.partition(": ")[2] for note in against.notes([slow])] == [
        "memory pressure needed a second try",
        "the VM was booted 2 times, because the emulated one got stuck",
        "200 s of CPU time by the cgroup, 150 s by the processes that were waited for",
    ]


BUILD = """#!/bin/sh
# In place of scripts/ami-builder: uses a CPU in a process of another session, and leaves a record.
set -e
[ "$1" = build ]
{{ [ -e .venv ] && [ "$2" = --force ]; }} || mkdir .venv
[ "$HOME" != "{home}" ]
[ -z "$AMI_BUILDER_HOME$XDG_CACHE_HOME" ]
started=$(date -u +%Y-%m-%dT%H:%M:%S.%NZ)
setsid sh -c 'timeout {seconds} sh -c "while :; do :; done"' || true
runs="$HOME/.local/state/ami-builder/runs/$(date +%s%N)"
mkdir -p "$runs"
cat >"$runs/record.json" <<END
{{"run_id": "r", "started": "$started", "steps": [
 {{"name": "build dask", "seconds": {seconds}, "status": "passed", "began": 0}},
 {{"name": "build dask > memory pressure", "seconds": {seconds}, "status": "passed", "began": 0}}
]}}
END
"""


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, Mapping[Side, str]]:
    """A repository with two commits, of which the old one takes twice as long to build."""
    folder = tmp_path / "checkout"
    (folder / "scripts" / "lib").mkdir(parents=True)
    (folder / "scripts" / "lib" / "setup.sh").write_text("packages=()\nlook_for_programs() { :; }\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    commits = {}
    for side, seconds in ((Side.OLD, 1.2), (Side.NEW, 0.6)):
        script = folder / "scripts" / "ami-builder"
        script.write_text(BUILD.format(home=Path.home(), seconds=seconds))
        script.chmod(0o755)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "--no-gpg-sign", "-m", side], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commits[side] = head.stdout.strip()
    return folder, commits


def test_both_commits_are_built_in_fresh_clones(
    checkout: tuple[Path, Mapping[Side, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builds = list(against.measured(*checkout, 1, cached=True))
    assert [(build.side, build.kind, build.status) for build in builds] == [
        (side, kind, 0) for kind in Kind for side in Side
    ]
    assert [phase.name for phase in builds[0].phases] == ["set-up", "memory pressure"]
    for build in builds:
        # Whoever counts it; on a busy host the loop gets less than a CPU.
        assert build.cpu == pytest.approx(build.cpu_waited, abs=0.1)
        assert 0.05 < build.cpu_waited <= build.wall
    assert not list(tmp_path.glob("ami-builder-against-*"))


def test_without_root_it_counts_what_was_waited_for(
    checkout: tuple[Path, Mapping[Side, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for build in against.measured(*checkout, 1, cached=False):
        assert build.cpu == build.cpu_waited > 0.05
        assert [phase.cpu for phase in build.phases] == [None, None]


def test_packages_are_not_installed_while_it_is_measured(
    checkout: tuple[Path, Mapping[Side, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commits = checkout
    (folder / "scripts" / "lib" / "setup.sh").write_text("look_for_programs() { packages=(socat); }\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "commit", "-q", "--no-gpg-sign", "-a", "-m", "more"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install socat"):
        list(against.measured(folder, {**commits, Side.NEW: head.stdout.strip()}, 1, cached=False))


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119.4, "119 s"), (120, "2:00 min")])
def test_durations(seconds: float, text: str) -> None:
    assert host.minutes(seconds) == text


def test_places_to_spill_to_are_compared_with_the_first() -> None:
    turn = {"write": 20.0, "read": 10.0, "cpu": 5.0}
    found = {"layer": [turn, turn], "disk": [{"write": 6.0, "read": 3.0, "cpu": 5.0}]}
    assert spilling.table(found) == [("layer", 20.0, 10.0, 5.0, 1.0), ("disk", 6.0, 3.0, 5.0, 0.3)]


def test_what_layers_add_is_a_share_of_the_time_without_them() -> None:
    pairs = [layering.Pair(off=(100.0, 50.0), on=(100.0 + n, 50.0)) for n in (0, 1, 2, 3, 40)]
    assert layering.costs(pairs, 0) == pytest.approx((0.02, 0.01, 0.03))
    assert layering.costs(pairs, 1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("work", layering.WORKS)
def test_the_work_beside_which_layers_are_timed_gets_done(work: Work) -> None:
    case = Case(memory=64 * MIB, cpus=1, policy=LimitPolicy.DEFAULT, work=work, repeat=1, seed=1)
    given = tasks(case, Memory(total=64 * MIB, available=64 * MIB))
    argv = [sys.executable, "-m", "tests.layered_work", str(1 << 30)]
    text = json.dumps([asdict(task) for task in given])
    done = subprocess.run(argv, input=text, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["done"] == found["of"] == sum(task.kept for task in given)
    assert found["seconds"] > 0
    assert found["busy"] > 0

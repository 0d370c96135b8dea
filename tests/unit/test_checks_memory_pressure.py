"""Every check of the phase `pressure`, held against what real machines answered, and against ill ones."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter

from ami_builder.checks import check_names, plugin
from ami_builder.checks.login_times import LoginTimes
from ami_builder.checks.machine_state import Incomplete
from ami_builder.checks.pressure_result import EndedBy, PressureResult
from ami_builder.core import oom
from tests.unit.test_checks import CONTEXT, MIB, Change, Text, put, sub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from ami_builder.checks.context import Context

RECORDED = Path(__file__).parents[1] / "recorded"
# Both were recorded when a worker that leaked was tried twice, and only the time of each answer was kept,
# with a pause of 1 s after it. The reports of kills and the kernel's own times were added later.
# Here only the first leak is left, with its kill, and a login took the time
# between two answers without that pause. The first login, before Dask had work, is the one at rest.
GOOD = json.loads((RECORDED / "memory_pressure.json").read_text())
"""What a VM of 2 GiB answered, limited as ours are."""
UNLIMITED = json.loads((RECORDED / "memory_pressure_without_limit.json").read_text())
"""A VM with the two lines about memory taken out of its Compose file, given little to spill."""

DASK = json.loads(GOOD["dask"])
MEMCG = GOOD["memcg"].strip()
GROWER = re.search(r"pid (\d+)", GOOD["grower"])


@pytest.fixture(scope="module", autouse=True)
def _markers(pytestconfig: pytest.Config) -> None:
    pytestconfig.addinivalue_line("markers", "pressure: as the plugin has it")


def module() -> ModuleType:
    return importlib.import_module("ami_builder.checks.test_memory_pressure")


def each_check() -> Iterator[tuple[str, Callable[..., object]]]:
    for name, check in vars(module()).items():
        if name.startswith("test_"):
            yield check_names.readable(f"test_memory_pressure.py::{name}"), check


def parse(recorded: dict[str, Any]) -> PressureResult:
    text = {name: value for name, value in recorded.items() if name != "watched"}
    return PressureResult.parse(text, TypeAdapter(LoginTimes).validate_python(recorded["watched"]))


def judge(
    recorded: dict[str, Any], notes: list[str] | None = None, context: Context = CONTEXT
) -> dict[str, str]:
    """Run every check as pytest would, and return those that did not pass with their message."""
    makers: dict[str, Callable[[], object]] = {
        "pressure": partial(parse, recorded),
        "context": lambda: context,
        "note": lambda: (notes if notes is not None else []).append,
    }
    failed: dict[str, str] = {}
    for name, check in each_check():
        try:
            check(**{key: makers[key]() for key in inspect.signature(check).parameters})
        except AssertionError as wrong:
            failed[name] = str(wrong)
        except pytest.skip.Exception as skipped:
            failed[name] = f"skipped: {skipped}"
    return failed


def red(recorded: dict[str, Any]) -> set[str]:
    return {name for name, why in judge(recorded).items() if not why.startswith("skipped: ")}


def inconclusive(recorded: dict[str, Any]) -> set[str]:
    prefix = f"skipped: {plugin.INCONCLUSIVE}"
    return {name for name, why in judge(recorded).items() if why.startswith(prefix)}


def dask(*path: str | int, value: object) -> Change:
    """Change one value of what memory_pressure.py wrote."""

    def change(text: Text) -> None:
        answer = json.loads(text["dask"])
        place = answer
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        text["dask"] = json.dumps(answer)

    return change


def stopped(at: str, *without: str) -> Change:
    """An answer of steps that came to an end too early."""

    def change(text: Text) -> None:
        answer = json.loads(text["dask"]) | {"error": f"{at}: it went wrong"}
        text["dask"] = json.dumps({key: value for key, value in answer.items() if key not in without})

    return change


Timed = tuple[float, float]
"""A login's seconds, and for how many of them the host did not run the VM."""


def login(began: float, timed: float | Timed, failed: str = "") -> dict[str, object]:
    seconds, denied = timed if isinstance(timed, tuple) else (timed, 0.0)
    return {"began": began, "seconds": seconds, "denied": denied, "failed": failed}


def put_watched(watched: Any) -> Change:
    return lambda text: text.__setitem__("watched", watched)


def logins(rest: Sequence[float | Timed], under: Sequence[float | Timed], busy: float = 0.0) -> Change:
    """Logins at rest and under pressure that took so long."""
    watched = {
        "rest": [login(100.0 * n, timed) for n, timed in enumerate(rest)],
        "logins": [login(1000.0 + 100 * n, timed) for n, timed in enumerate(under)],
        "ended": True,
        "busy": busy,
    }
    return put_watched(watched)


def failing(which: str, timed: float | Timed) -> Change:
    """One of the logins failed after so long, and the next one came at once."""

    def change(text: Text) -> None:
        watched: Any = GOOD["watched"]
        more = [login(90.0, timed, "Connection reset by peer"), login(90.1, 0.5)]
        put_watched(watched | {which: [*more, *watched[which]]})(text)

    return change


def globally(count: int = 0) -> Change:
    """So many were killed because the whole machine was full; 0: all."""
    return sub("kernel", r"CONSTRAINT_MEMCG(.*?)oom_memcg=[^,]*", r"CONSTRAINT_NONE\1global_oom", count=count)


def beside(text: Text) -> None:
    """The container's limit is large, so that the nanny has all room."""
    put("memory.max", f"{16 << 30}\n")(text)
    for key in ("workers", "back"):
        dask(key, 0, "limit", value=16 << 30)(text)
    dask("spill", "limit", value=1 << 30)(text)


def later(line: str, seconds: float) -> str:
    """A line of the kernel's log, so many seconds later."""
    return re.sub(r"[\d.]+", lambda stamp: f"{float(stamp[0]) + seconds:.6f}", line, count=1)


def leak_again(text: Text) -> None:
    """A second worker leaked, and was killed as the first one."""
    first = next(line for line in text["kernel"].splitlines() if "task=python" in line)
    killed, grown = parse(GOOD).kills[0].seconds, parse(GOOD).grower.began
    text["kernel"] += later(first, (grown - killed) / 2)
    dask("leaks", value=[*DASK["leaks"], {"time": killed + 0.001, "pid": 4711}])(text)


SSH = "memory pressure: ssh stays responsive"
REPORTED = "memory pressure: each kill is reported at once"
REASON = "memory pressure: each end of a worker has its reason"
WORK = "memory pressure: work larger than the limit finishes by spilling"

# name of the machine -> (what is changed, the checks that must be red)
ILL: dict[str, tuple[list[Change], set[str]]] = {
    "Dask hangs": (
        [stopped("leaking", "leaked", "served", "back")],
        {"memory pressure: all steps completed"},
    ),
    "the client gets no answer": (
        [put("dask", ""), put("client", "OSError: Timed out trying to connect\n")],
        {"memory pressure: all steps completed"},
    ),
    "results come back wrong": (
        [dask("spill", "read", value=-1)],
        {WORK},
    ),
    "nothing spilled": (
        [dask("spill", "spilled", value=0)],
        {WORK},
    ),
    "restarted while spilling": (
        [dask("spill", "pids", value=[4711])],
        {WORK},
    ),
    "the leak is survived": (
        [
            dask("leaked", value="went on to the end, with 1 bytes"),
            dask("leaks", value=[]),
            sub("kernel", r"^.*oom-kill.*\n", ""),
        ],
        {
            "memory pressure: a leak ends as a killed worker",
            "memory pressure: the leaking worker is restarted",
            "memory pressure: another process is killed alone",
        },
    ),
    "tried again": (
        [lambda text: leak_again(text)],
        {"memory pressure: a leak ends as a killed worker", REPORTED, REASON},
    ),
    "the leak hangs, and ends otherwise": (
        [dask("leaked", value="CancelledError")],
        {"memory pressure: a leak ends as a killed worker"},
    ),
    "nobody tells who killed": (
        [sub("kernel", r"^.*task=python.*$\n", "")],
        {"memory pressure: the leaking worker is restarted"},
    ),
    "the machine had no memory left": (
        [globally(1)],
        {
            REASON,
            "memory pressure: the leaking worker is restarted",
            "memory pressure: no kill outside the container",
        },
    ),
    "there is no limit": (
        [put("memory.max", "max\n"), globally()],
        {
            REASON,
            "memory pressure: the leaking worker is restarted",
            "memory pressure: another process is killed alone",
            "memory pressure: no kill outside the container",
        },
    ),
    "killed outside the container": (
        [sub("kernel", r"task_memcg=[^,]*", "task_memcg=/system.slice/docker.service", count=1)],
        {
            REASON,
            "memory pressure: the leaking worker is restarted",
            "memory pressure: no kill outside the container",
        },
    ),
    "the nanny sleeps": ([beside], {"memory pressure: the leaking worker is restarted"}),
    "the other process survives": (
        [sub("grower", r"status \d+", "status 0"), sub("kernel", r"^.*task=dd.*$\n", "")],
        {"memory pressure: another process is killed alone"},
    ),
    "the other process takes one with it": (
        [lambda text: put("kernel", text["kernel"] + text["kernel"].replace(f"pid={pid()}", "pid=1"))(text)],
        {"memory pressure: another process is killed alone", REPORTED},
    ),
    "docker was restarted": (
        [
            sub(
                "services.after",
                r"(Type=\w+\nResult=success\nNRestarts=)0(\nId=docker\.service)",
                r"\g<1>1\2",
            )
        ],
        {"memory pressure: services keep running"},
    ),
    "the journal is another one": (
        [sub("services.after", r"(Id=systemd-journald(?:.|\n)*?InvocationID=)\w+", r"\g<1>f00")],
        {"memory pressure: services keep running"},
    ),
    "ssh failed": (
        [sub("services.after", r"Result=success(\nNRestarts=0\nId=ssh\.service)", r"Result=oom-kill\1")],
        {"memory pressure: services keep running"},
    ),
    "the container is a new one": (
        [sub("container.after", r"true \S+", "true 2026-11-25T17:00:00Z")],
        {"memory pressure: the container keeps running"},
    ),
    "the worker came back with another limit": (
        [dask("back", 0, "limit", value=123 * MIB)],
        {"memory pressure: the workers are back"},
    ),
    "the worker does not work": ([dask("served", value=None)], {"memory pressure: the workers are back"}),
    "a worker stayed away": (
        [dask("back", value=[])],
        {"memory pressure: the workers are back"},
    ),
    "nothing watches the kernel's kills": ([put("journal", ""), put("recorded", "")], {REPORTED}),
    "a kill is not in the journal": ([sub("journal", r"\(pid \d+", "(pid 1", count=1)], {REPORTED}),
    "a kill is recorded later": (
        [sub("recorded", r'"time": \d+', '"time": 1795639790', count=1)],
        {REPORTED},
    ),
    "a kill has no time": ([sub("recorded", r'"time": [\d.]+', '"time": null', count=1)], {REPORTED}),
    "a kill is not recorded": ([sub("recorded", r'"pid": \d+', '"pid": 1', count=1)], {REPORTED}),
    "the scheduler has no reason": ([dask("deaths", value=[])], {REASON}),
    "the reason is another one": ([dask("deaths", 0, "by", value="signal")], {REASON}),
    "the container's log has no reason": ([put("container.log", "")], {REASON}),
    "the nanny's doing is not in the journal": (
        [
            dask("nanny", value=[DASK["leaks"][0] | {"rss": 1}]),
            dask("deaths", 0, "by", value="nanny"),
        ],
        {REASON},
    ),
    "frozen": ([logins([0.7] * 4, [0.8, 29.0, 0.8])], {SSH}),
    "frozen, on a slow host": ([logins([3.0] * 4, [3.0, 15.1])], {SSH}),
    "frozen to the end": ([logins([0.7] * 4, [0.8, 60.0])], {SSH}),
    "frozen, and the host ran the VM for half of that": ([logins([0.7] * 4, [(29.0, 14.0)])], {SSH}),
    "a little too slow, on a fast host": ([logins([0.1] * 4, [0.1, 10.1])], {SSH}),
    "a login failed": ([failing("logins", 1.0)], {SSH}),
    "a login failed that the host kept from running for a part": ([failing("logins", (10.0, 7.0))], {SSH}),
    "a login at rest failed": ([failing("rest", 1.0)], {SSH}),
}


def pid() -> str:
    assert GROWER is not None
    return GROWER[1]


def test_a_machine_like_ours_is_green_and_says_how_it_went() -> None:
    notes: list[str] = []
    assert judge(GOOD, notes) == {}
    spilled, restarted, answered = notes
    assert re.fullmatch(r"[\d.]+ GiB of data \([12]\.\d x the limit\) in \d+ s", spilled)
    assert re.match(r"restarted by (the nanny|the kernel, at the container's limit) \(1 times\)", restarted)
    assert re.search(r"on machines from [\d.]+ GiB on \([\d.]+ GiB without a scheduler", restarted)
    times = r"[\d.]+ s, [\d.]+ s at rest: [\d.]+ x, allowed 5 x or 10 s"
    assert re.fullmatch(rf"\d+ logins; longest wait for a login {times}.*", answered)


def test_a_machine_without_a_limit_is_red() -> None:
    found = judge(UNLIMITED)
    assert set(found) - {WORK} == {
        "memory pressure: the leaking worker is restarted",
        "memory pressure: another process is killed alone",
        "memory pressure: no kill outside the container",
        SSH,
    }
    assert parse(UNLIMITED).worker_ends() == (EndedBy.MACHINE,)
    longest = max(login["seconds"] for login in UNLIMITED["watched"]["logins"])
    assert longest > 10
    assert found[SSH].startswith(f"longest wait for a login {longest:.1f} s, ")


@pytest.mark.parametrize("name", ILL)
def test_ill_machine_is_found_out(name: str) -> None:
    changes, expected = ILL[name]
    recorded = dict(GOOD)
    for change in changes:
        change(recorded)
    assert red(recorded) == expected


def test_every_check_can_fail_and_says_why_it_matters() -> None:
    found_out = set().union(*(expected for _, expected in ILL.values()))
    assert {name for name, _ in each_check()} == found_out
    assert [name for name, check in each_check() if not (check.__doc__ or "").strip()] == []


def test_what_was_not_come_to_is_blocked() -> None:
    recorded = dict(GOOD)
    stopped("spilling", "leaked", "served", "back")(recorded)
    found = judge(recorded)
    assert (
        found["memory pressure: the workers are back"] == f"skipped: {plugin.BLOCKED}spilling: it went wrong"
    )
    assert set(found) == {
        "memory pressure: all steps completed",
        "memory pressure: a leak ends as a killed worker",
        "memory pressure: the leaking worker is restarted",
        "memory pressure: the workers are back",
        REASON,
    }


def test_a_small_disk_is_said_not_hidden() -> None:
    recorded = dict(GOOD)
    dask("spill", "size", value=1024 * MIB)(recorded)
    name = WORK
    assert judge(recorded)[name].endswith("(verify.disk_size)")


def test_the_nannys_headroom_is_named_where_it_is_needed() -> None:
    """200 MiB beside the workers are more than 5 % of what 2 GiB have for Dask."""
    recorded, notes = dict(GOOD), list[str]()
    put("memory.stat", f"anon {200 * MIB + parse(GOOD).idle}\n")(recorded)
    assert judge(recorded, notes) == {}
    assert "the container uses 200 MiB" in notes[1]
    limit = parse(GOOD).limit
    assert limit is not None
    needed = -(-oom.least_headroom(limit, beside=200 * MIB) // MIB)
    assert needed > 100
    assert f"nanny_headroom of {needed} MiB" in notes[1]
    assert re.search(r"on machines from [34]\.\d GiB on", notes[1])


def test_whoever_comes_first_ended_the_worker() -> None:
    first = DASK["leaks"][0]
    event = {"time": first["time"] + 0.1, "pid": first["pid"], "rss": 1}
    recorded = dict(GOOD)
    dask("nanny", value=[])(recorded)
    kernel = parse(GOOD).kills[0]
    assert first["time"] < kernel.seconds
    assert parse(recorded).worker_ends() == (EndedBy.CONTAINER,)
    dask("nanny", value=[event])(recorded)
    assert parse(recorded).worker_ends() == (EndedBy.NANNY,)
    for later in (event | {"pid": 1}, event | {"time": first["time"] + 3600}):
        dask("nanny", value=[later])(recorded)
        assert parse(recorded).worker_ends() == (EndedBy.CONTAINER,)


@pytest.mark.parametrize(
    ("rest", "under"),
    [
        ([5.0] * 4, [6.0, 12.0, 7.0]),
        ([5.0, 5.0, 5.0, 5.0], [25.0]),
        ([0.1] * 4, [10.0]),
        # One slow login at rest is no measure: the median is.
        ([0.7, 0.7, 0.7, 30.0], [3.0]),
        # What the host denied the VM is not counted: at rest, either.
        ([0.7] * 4, [(60.0, 54.0)]),
        ([(10.0, 9.0)] * 4, [5.0]),
    ],
)
def test_a_vm_that_is_slow_at_rest_already_is_green(
    rest: list[float | Timed], under: list[float | Timed]
) -> None:
    recorded, notes = dict(GOOD), list[str]()
    logins(rest, under)(recorded)
    assert judge(recorded, notes) == {}
    assert notes[-1].startswith(f"{len(under)} logins; longest wait for a login")


@pytest.mark.parametrize(
    ("rest", "under"),
    [
        ([0.7] * 4, [0.8, (60.0, 46.0)]),
        ([20.1] * 4, [20.0, 101.0]),
    ],
    ids=["denied", "useless control"],
)
def test_a_host_that_is_too_busy_to_tell_is_inconclusive(
    rest: list[float | Timed], under: list[float | Timed]
) -> None:
    recorded = dict(GOOD)
    logins(rest, under, busy=0.83)(recorded)
    assert inconclusive(recorded) == {SSH}
    assert red(recorded) == set()
    why = judge(recorded)[SSH].removeprefix(f"skipped: {plugin.INCONCLUSIVE}")
    assert why.startswith("longest wait for a login ")
    assert "The host was too busy" in why
    assert why.endswith("83% of the time")


@pytest.mark.parametrize("which", ["rest", "logins"])
def test_a_login_that_failed_while_the_host_denied_the_vm_is_inconclusive(which: str) -> None:
    recorded = dict(GOOD)
    failing(which, (60.0, 46.0))(recorded)
    assert inconclusive(recorded) == {SSH}
    assert red(recorded) == set()


def test_the_login_that_failed_by_itself_is_named() -> None:
    recorded = dict(GOOD)
    failing("rest", (60.0, 59.0))(recorded)
    under = [login(0.0, 1.0, "Connection refused"), login(4.0, 1.0)]
    recorded["watched"] = recorded["watched"] | {"logins": under}
    assert judge(recorded)[SSH].splitlines()[0] == "1 logins failed: Connection refused"


@pytest.mark.parametrize(("apart", "rest", "beside"), [(0.5, 0.1, True), (2.0, 0.1, False), (2.0, 4.0, True)])
def test_a_second_kill_is_beside_another_by_the_measure_of_the_host(
    apart: float, rest: float, beside: bool
) -> None:
    """Where a login at rest takes 4 s, no worker is up again 2 s after a kill."""
    recorded = dict(GOOD)
    first = next(line for line in GOOD["kernel"].splitlines() if "task=python" in line)
    second = later(first, apart).replace("task=python", "task=dask")
    sub("kernel", r"^.*task=dd.*$", second)(recorded)
    logins([rest] * 4, [rest])(recorded)
    assert bool(parse(recorded).double_kill()) is beside


@pytest.mark.parametrize(("late", "reported"), [(-1.5, True), (-2.5, False), (0.5, True), (1.5, False)])
def test_a_kill_is_recorded_within_a_second(late: float, reported: bool) -> None:
    """Times in /run/dask/kills are up to a second early, and never late by themselves."""
    recorded, kill = dict(GOOD), parse(GOOD).kills[0]
    logins([0.1] * 4, [0.1])(recorded)
    sub("recorded", r'"time": [\d.]+', f'"time": {kill.seconds + late}', count=1)(recorded)
    assert (REPORTED not in red(recorded)) is reported


def test_a_kill_is_the_growers_by_its_pid() -> None:
    """The kernel's clock and that of `date` are read one after the other, and a host may pause in between."""
    recorded, kill = dict(GOOD), parse(GOOD).kills[0]
    sub("kernel", r"the time is \d+", f"the time is {int(kill.seconds) - 120}")(recorded)
    assert "memory pressure: another process is killed alone" not in red(recorded)


def test_a_service_that_dbus_started_may_end() -> None:
    recorded = dict(GOOD)
    idle = "Type=dbus\nResult=success\nNRestarts=0\nId=idle.service\nActiveState={}\nInvocationID={}\n\n"
    for name, state in (("before", ("active", "f")), ("after", ("inactive", ""))):
        recorded[f"services.{name}"] = idle.format(*state) + recorded[f"services.{name}"].lstrip()
    assert red(recorded) == set()
    recorded["services.before"] = recorded["services.before"].replace("Type=dbus", "Type=simple", 1)
    assert red(recorded) == {"memory pressure: services keep running"}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.pop("end"),
        lambda text: text.pop("services.after"),
        put("memory.max", "many\n"),
        put("dask", "{"),
        put("grower", "began 1\n"),
        put("kernel", "oom-kill:constraint=CONSTRAINT_MEMCG, cut off\n"),
        put("kernel", ""),
    ],
    ids=["end", "section", "limit", "dask", "grower", "kernel", "clock"],
)
def test_half_an_answer_is_none(change: Change) -> None:
    recorded = dict(GOOD)
    change(recorded)
    with pytest.raises(Incomplete):
        parse(recorded)


def test_another_number_of_workers() -> None:
    """The idle ones take from the room that the nanny needs."""
    recorded = dict(GOOD)
    share = DASK["back"][0]["limit"] // 2
    two = [{"pid": n, "limit": share, "spillable": 1} for n in (1, 2)]
    for key in ("workers", "back"):
        dask(key, value=two)(recorded)
    context = replace(CONTEXT, workers=2)
    module().test_the_workers_are_back(parse(recorded), context)
    with pytest.raises(AssertionError, match="were left when the nanny should have done it"):
        module().test_the_leaking_worker_is_restarted(parse(recorded), context, print)

"""The gate: harm past a bound holds, with a reason that a person understands, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.cli import app as cli
from ami_builder.config.schema import NightlySettings
from ami_builder.core.diff import Quantity, Side, compare
from ami_builder.core.errors import OnHold
from ami_builder.nightly.gate import judge, moved, not_compared, require_close
from ami_builder.state.workspace import Workspace
from tests.unit.test_diff import stored, workspace  # noqa: F401 - a fixture

GIB = 1 << 30
MIB = 1 << 20
BOUNDS = NightlySettings(
    channel="testing",
    memory_drift_percent=3,
    time_drift_percent=50,
    size_drift_percent=20,
    hold_packages=("linux-image-*",),
)


def changed(side: Side, *, size: int | None = None, **measured: Mapping[str, float]) -> Side:
    """Return what is recorded with other values of some quantities."""
    values: dict[Quantity, Mapping[str, float]] = {
        Quantity[name.upper()]: measured[name] for name in measured
    }
    values |= {} if size is None else {Quantity.SIZE: {"": size}}
    return replace(side, measured={**side.measured, **values})


BASE = changed(
    Side(packages={"apt": "1", "linux-image-6.12": "6.12.1"}, measured={}),
    size=GIB,
    available={"2 GiB": 1700 * MIB},
    boot={"2 GiB": 50.0},
    ssh={"2 GiB": 60.0},
    dask={"2 GiB": 90.0},
    time={"build": 100.0},
)


def _texts(after: Side, before: Side = BASE, bounds: NightlySettings = BOUNDS) -> list[str]:
    return [drift.text for drift in judge(compare(before, after), bounds)]


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (
            changed(BASE, available={"2 GiB": 1557 * MIB}),
            "available memory at boot on 2 GiB fell from 1.66 GiB to 1.521 GiB (-8.4 %, bound 3 %)",
        ),
        (
            changed(BASE, available={"2 GiB": 0}),
            "available memory at boot on 2 GiB fell from 1.66 GiB to 0 B (-100.0 %, bound 3 %)",
        ),
        (
            changed(BASE, boot={"2 GiB": 80.0}),
            "CPU time to boot on 2 GiB rose from 50.00 x control to 80.00 x control (+60.0 %, bound 50 %)",
        ),
        (
            changed(BASE, size=GIB * 5 // 4),
            "the image's size rose from 1 GiB to 1.25 GiB (+25.0 %, bound 20 %)",
        ),
        (
            changed(BASE, available={"4 GiB": 3 * GIB}, boot={}, ssh={}, dask={}),
            "2 GiB was measured before (1.66 GiB available at boot) but not now",
        ),
        (
            replace(BASE, packages={"apt": "1", "linux-image-6.12": "6.12.2"}),
            "linux-image-6.12 changed from 6.12.1 to 6.12.2, matched by"
            " nightly.hold_packages (linux-image-*)",
        ),
        (
            replace(BASE, packages={**(BASE.packages or {}), "linux-image-6.13": "6.13.1"}),
            "linux-image-6.13 6.13.1 is new, matched by nightly.hold_packages (linux-image-*)",
        ),
        (
            replace(BASE, packages={"apt": "1"}),
            "linux-image-6.12 6.12.1 was removed, matched by nightly.hold_packages (linux-image-*)",
        ),
    ],
)  # fmt: skip
def test_what_holds(after: Side, text: str) -> None:
    assert _texts(after) == [text]


@pytest.mark.parametrize(
    "after",
    [
        changed(BASE, available={"2 GiB": 1700 * MIB * 97 // 100}),
        changed(BASE, boot={"2 GiB": 75.0}),
        # A busy host makes those longer.
        changed(BASE, ssh={"2 GiB": 6000.0}, dask={"2 GiB": 9000.0}),
        changed(BASE, size=GIB * 6 // 5),
        changed(BASE, size=1),
        changed(BASE, time={"build": 10000.0}),
        replace(BASE, packages={"apt": "2", "linux-image-6.12": "6.12.1"}),
        changed(BASE, available={"2 GiB": 1700 * MIB, "4 GiB": 1}),
        replace(BASE, packages=None),
        changed(BASE, ssh={}),
        changed(BASE, boot={}),
    ],
)
def test_what_does_not_hold(after: Side) -> None:
    assert _texts(after) == []


def test_a_bound_of_zero_is_to_the_byte_and_shows_it() -> None:
    exact = replace(BOUNDS, memory_drift_percent=0)
    (text,) = _texts(changed(BASE, available={"2 GiB": 1700 * MIB - 1}), bounds=exact)
    assert "fell from 1,782,579,200 to 1,782,579,199" in text


def test_what_can_not_be_compared_is_said() -> None:
    unknown = Side(packages=None, measured={Quantity.SIZE: {"": 0}})
    assert not_compared(compare(BASE, BASE)) == ()
    assert _texts(BASE, before=unknown) == []
    assert not_compared(compare(unknown, BASE)) == (
        "the image's size can't be compared: 0 B before, 1 GiB now",
        "available memory at boot on 2 GiB can't be compared: not measured before, 1.66 GiB now",
        "packages are not compared: one of the images has no list here",
    )
    assert not_compared(compare(unknown, unknown)) == (
        "the image's size can't be compared: 0 B before, 0 B now",
        "available memory at boot is not compared: neither image was measured here",
        "packages are not compared: one of the images has no list here",
    )
    assert not_compared(compare(BASE, changed(BASE, ssh={}, dask={}))) == ()


def test_a_boot_that_can_not_be_compared_is_said_once_for_each_machine() -> None:
    two = changed(BASE, available={"2 GiB": 1700 * MIB, "4 GiB": 3 * GIB}, boot={"4 GiB": 40.0})
    neither = changed(two, boot={})
    assert not_compared(compare(BASE, changed(BASE, boot={}))) == (
        "CPU time to boot on 2 GiB can't be compared: 50.00 x control before, not measured now",
    )
    assert not_compared(compare(neither, two)) == (
        "CPU time to boot on 2 GiB can't be compared: not measured before, not measured now",
        "CPU time to boot on 4 GiB can't be compared: not measured before, 40.00 x control now",
    )
    assert _texts(two, before=neither) == _texts(neither, before=two) == []
    # What is said of the machine is enough.
    assert not_compared(compare(BASE, two)) == (
        "available memory at boot on 4 GiB can't be compared: not measured before, 3 GiB now",
        "CPU time to boot on 2 GiB can't be compared: 50.00 x control before, not measured now",
    )


def test_what_moved_is_named_with_the_likeliest_first() -> None:
    names = ["apt", "zlib", "docker.io", "linux-image-6.12", "container:dask:1", "libhold1"]
    before = Side(packages=dict.fromkeys(names, "1"), measured={})
    after = Side(packages={**dict.fromkeys(names[1:], "2"), "bash": "5"}, measured={})
    difference, bounds = compare(before, after), replace(BOUNDS, hold_packages=("libhold*",))
    assert moved(difference, bounds) == (
        "libhold1 changed from 1 to 2",
        "container:dask:1 changed from 1 to 2",
        "linux-image-6.12 changed from 1 to 2",
        "docker.io changed from 1 to 2",
        "apt 1 was removed",
        "bash 5 is new",
        "zlib changed from 1 to 2",
    )
    assert moved(difference, bounds, most=2)[1:] == (
        "container:dask:1 changed from 1 to 2",
        "and 5 more packages",
    )
    assert moved(compare(before, replace(after, packages=None)), bounds) == ()


def test_a_hold_says_which_package_moved() -> None:
    require_close(compare(BASE, BASE), BOUNDS)
    packages = {"apt": "2", "linux-image-6.12": "6.12.2"}
    with pytest.raises(OnHold) as caught:
        require_close(compare(BASE, replace(changed(BASE, size=2 * GIB), packages=packages)), BOUNDS)
    assert [line[:16] for line in caught.value.tail] == [
        "the image's size",
        "linux-image-6.12",
        "apt changed from",
    ]
    with pytest.raises(OnHold) as caught:
        require_close(compare(BASE, replace(BASE, packages=packages)), BOUNDS)
    assert len(caught.value.tail) == 1, "of a hold for its package alone, the others say nothing"
    assert caught.value.exit_code == 9


machines = st.sampled_from(["1 GiB", "2 GiB", "m6i.large"])
whole = st.integers(0, 1 << 45)
times = st.floats(0, 1e6)
packages = st.none() | st.dictionaries(
    st.sampled_from(["apt", "bash", "linux-image-1"]), st.sampled_from("12")
)
sides = st.builds(
    Side,
    packages=packages,
    measured=st.fixed_dictionaries(
        {
            Quantity.SIZE: st.fixed_dictionaries({"": whole}),
            Quantity.AVAILABLE: st.dictionaries(machines, whole),
            Quantity.BOOT: st.dictionaries(machines, times),
            Quantity.SSH: st.dictionaries(machines, times),
            Quantity.DASK: st.dictionaries(machines, times),
            Quantity.TIME: st.dictionaries(st.just("build"), times),
        }
    ),
)
percents = st.integers(0, 1000)
bounds = st.builds(
    NightlySettings,
    channel=st.just("testing"),
    memory_drift_percent=percents,
    time_drift_percent=percents,
    size_drift_percent=percents,
    hold_packages=st.lists(st.sampled_from(["*", "apt", "linux-*"]), max_size=2).map(tuple),
)


@given(sides, bounds)
def test_the_same_never_drifts(side: Side, bound: NightlySettings) -> None:
    assert judge(compare(side, side), bound) == ()


@given(sides, sides, bounds, bounds)
def test_a_wider_bound_never_holds_more(
    before: Side, after: Side, one: NightlySettings, other: NightlySettings
) -> None:
    wider = NightlySettings(
        channel="",
        memory_drift_percent=max(one.memory_drift_percent, other.memory_drift_percent),
        time_drift_percent=max(one.time_drift_percent, other.time_drift_percent),
        size_drift_percent=max(one.size_drift_percent, other.size_drift_percent),
        hold_packages=tuple(set(one.hold_packages) & set(other.hold_packages)),
    )
    difference = compare(before, after)
    strict = {(drift.quantity, drift.name) for drift in judge(difference, one)}
    assert {(drift.quantity, drift.name) for drift in judge(difference, wider)} <= strict


@given(sides, sides, bounds)
def test_an_improvement_never_holds(before: Side, after: Side, bound: NightlySettings) -> None:
    old, new = before.measured, after.measured
    available, boot = new[Quantity.AVAILABLE], new[Quantity.BOOT]
    better = replace(
        changed(
            after,
            available={name: max(v, available.get(name, 0)) for name, v in old[Quantity.AVAILABLE].items()},
            boot={name: min(v, boot.get(name, v)) for name, v in old[Quantity.BOOT].items()},
            size=int(min(old[Quantity.SIZE][""], new[Quantity.SIZE][""])),
        ),
        packages=before.packages,
    )
    assert judge(compare(before, better), bound) == ()


@given(sides, sides, bounds)
def test_every_quantity_of_before_is_judged_or_said(
    before: Side, after: Side, bound: NightlySettings
) -> None:
    difference = compare(before, after)
    held = judge(difference, bound)
    for drift in held:
        assert drift.text
        assert "None" not in drift.text
        assert "\n" not in drift.text
    gone = {
        drift.name for drift in held if drift.quantity is Quantity.AVAILABLE and "but not now" in drift.text
    }
    old, new = (set(side.measured[Quantity.AVAILABLE]) for side in (before, after))
    assert gone == old - new
    lines = not_compared(difference)
    judged = {one.name for one in held if one.quantity is Quantity.BOOT}
    for machine in old & new:
        told = [line for line in lines if line.startswith(f"CPU time to boot on {machine} ")]
        values = [side.measured[Quantity.BOOT].get(machine) for side in (before, after)]
        assert len(told) == (None in values or values[0] == 0)
        assert not (told and machine in judged)
    assert ("packages" in " ".join(lines)) == (difference.packages is None)


def test_the_command(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    stored(workspace, "a", "apt=1\nbash=5\n", GIB, 100.0)
    stored(workspace, "b", "apt=2\nbash=5\n", GIB * 9 // 10, 100.0)
    assert cli.run(["diff", "aaaa", "bbbb"]) == 0
    plain = capsys.readouterr()
    assert cli.run(["diff", "aaaa", "bbbb", "--gate"]) == 9
    gated = capsys.readouterr()
    assert gated.out == plain.out
    assert "available memory at boot on 2 GiB fell from 1 GiB to 921.6 MiB (-10.0 %, bound 3 %)" in gated.err
    assert "apt changed from 1 to 2" in gated.err
    assert cli.run(["diff", "bbbb", "aaaa", "--gate"]) == 0
    assert "error" not in capsys.readouterr().err
    wide = ["--set", "nightly.memory_drift_percent=11", "--set", "nightly.hold_packages=apt"]
    assert cli.run([*wide, "diff", "aaaa", "bbbb", "--gate", "--json"]) == 9
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert [(one["quantity"], one["name"]) for one in answer["held"]] == [(None, "apt")]
    assert answer["not_compared"] == []
    assert "nightly.hold_packages (apt)" in shown.err
    assert cli.run(["diff", "aaaa", "bbbb", "--json"]) == 0
    assert "held" not in json.loads(capsys.readouterr().out)

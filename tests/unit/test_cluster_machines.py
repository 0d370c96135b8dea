"""The machines of a cluster, and what is said where they differ."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from distributed.versions import error_message

from ami_builder.core.records import Origin
from ami_builder.core.units import GIB
from ami_builder.doctor.machines import Spill, machines, warnings
from ami_builder.doctor.rules import Cluster, Reading, Scheduler, Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSIONS = {"dask": "2026.8.0", "distributed": "2026.8.0", "python": "3.13.5"}


def worker(name: str, boot: str = "one", **more: Any) -> Worker:
    plain = Reading(
        boot=boot,
        limit=GIB,
        nthreads=1,
        total=8 * GIB,
        available=7 * GIB,
        host=f"host-{boot}",
        directory=f"/spill/dask-scratch-space/worker-{name}",
        spill_system="xfs",
        spill_size=30 * GIB,
        spill_free=20 * GIB,
        max_spill=10 * GIB,
        versions=VERSIONS,
    )
    return Worker(address=f"tcp://{name}", name=name, reading=replace(plain, **more))


def cluster(*workers: Worker, **scheduler: Any) -> Cluster:
    plain = Scheduler(address="tcp://s", host="host-s", boot="s", versions=VERSIONS)
    return Cluster(workers=workers, scheduler=replace(plain, **scheduler), here=VERSIONS)


def origin(ami: str = "ami-1", **more: Any) -> Origin:
    plain = Origin(instance_type="m6i.large", ami=ami, name="dask-1", image="dask", channels=("stable",))
    return replace(plain, **more)


def warned(found: Cluster, origins: dict[str, Origin] | None = None) -> list[str]:
    known = origins or {}
    return list(warnings(found, machines(found, known), "eu-west-1" if origins is not None else ""))


def test_workers_of_a_machine_are_together_and_the_scheduler_is_first() -> None:
    told = cluster(worker("a"), worker("b", "two", instance="i-2"), worker("c", max_spill=5 * GIB))
    scheduler, one, two = machines(told, {"i-2": origin()})
    assert (scheduler.name, scheduler.scheduler, scheduler.workers) == ("host-s", True, ())
    assert scheduler.total is None
    assert (one.name, one.workers, one.origin) == ("host-one", ("tcp://a", "tcp://c"), None)
    assert (two.name, two.instance, two.origin) == ("i-2", "i-2", origin())
    assert one.spills == (Spill(folder="/spill", system="xfs", size=30 * GIB, free=20 * GIB, bound=15 * GIB),)
    assert one.versions == (VERSIONS,)


def test_a_laptop_is_one_machine() -> None:
    told = cluster(worker("0"), worker("1"), boot="one", host="laptop")
    (one,) = machines(told, {})
    assert (one.name, one.scheduler, len(one.workers)) == ("host-one", True, 2)
    assert warned(told) == []


def test_who_told_nothing_is_no_machine() -> None:
    told = cluster(Worker(address="tcp://x", silent=True), boot="", versions={}, problem="not allowed")
    assert machines(told, {}) == ()
    assert warned(told) == ["the scheduler's machine and versions can't be read: not allowed"]


def test_one_worker_without_a_bound_has_none() -> None:
    told = cluster(worker("a"), worker("b", max_spill=None))
    assert [spill.bound for one in machines(told, {}) for spill in one.spills] == [None]


def test_bounds_that_do_not_fit_together() -> None:
    told = cluster(*(worker(name, max_spill=11 * GIB) for name in "abc"))
    assert warned(told) == [
        "the workers of machine host-one may spill more than their file system holds",
    ]


def test_versions_that_differ() -> None:
    older = {**VERSIONS, "dask": "2025.1.0", "python": "3.13.1"}
    found = cluster(worker("a"), worker("b"), worker("c", "two", versions=older), versions=older)
    assert warned(found) == [
        "dask differs: 2025.1.0 on worker c, the scheduler; 2026.8.0 on 2 workers, this host",
    ]
    python = cluster(worker("a", versions={**VERSIONS, "python": "3.12.9"}))
    assert warned(python) == ["python differs: 3.12 on worker a; 3.13 on the scheduler, this host"]
    both = {**VERSIONS, "dask": "2025.1.0", "distributed": "2025.1.0"}
    assert warned(cluster(worker("a", versions=both))) == [
        "dask, distributed differ: 2025.1.0 on worker a; 2026.8.0 on the scheduler, this host",
    ]


PACKAGES = {
    **VERSIONS,
    **dict.fromkeys(("msgpack", "cloudpickle", "tornado", "toolz", "numpy", "pandas", "lz4"), "1.0.0"),
}


def told_by_dask(found: Cluster) -> set[str]:
    """Return the packages that distributed itself warns about when a client connects."""

    def asked(versions: Mapping[str, str]) -> dict[str, dict[str, str]]:
        return {"packages": dict(versions)}

    workers = {one.address: asked(one.reading.versions) for one in found.workers if one.reading is not None}
    message = error_message(asked(found.scheduler.versions), workers, asked(found.here))["warning"]
    return {name for name in PACKAGES if f"| {name} " in message}


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("who", ["worker", "scheduler", "here"])
@pytest.mark.parametrize("other", ["9.9.9", "none"])
def test_it_warns_of_the_packages_that_dask_warns_of(name: str, who: str, other: str) -> None:
    differs = {key: value for key, value in PACKAGES.items() if key != name}
    if other != "none":
        differs[name] = other
    found = Cluster(
        workers=(
            worker("a", versions=PACKAGES),
            worker("b", versions=differs if who == "worker" else PACKAGES),
        ),
        scheduler=Scheduler(
            address="tcp://s", boot="s", versions=differs if who == "scheduler" else PACKAGES
        ),
        here=differs if who == "here" else PACKAGES,
    )
    warning = " ".join(warned(found))
    # A host that only diagnoses need not have everything.
    expected = set() if (other, who) in (("none", "here"), ("none", "scheduler")) else told_by_dask(found)
    assert {key for key in PACKAGES if re.search(rf"\b{key}\b.* differs?:", warning)} == expected


def test_a_patch_of_python_is_no_difference() -> None:
    found = cluster(worker("a", versions={**VERSIONS, "python": "3.13.1"}))
    assert told_by_dask(found) == {"python"}
    assert warned(found) == []


def test_amis() -> None:
    workers = (worker("a", instance="i-1"), worker("b", "two", instance="i-2"))
    two = cluster(*workers, boot="one", instance="i-1")
    assert warned(two, {"i-1": origin(), "i-2": origin()}) == []
    assert warned(two, {"i-1": origin(), "i-2": origin("ami-2", channels=("testing",))}) == [
        "the machines run different AMIs: ami-1 on machine i-1; ami-2 on machine i-2",
    ]
    old = origin(channels=(), others=("stable=ami-9",))
    assert warned(two, {"i-1": old, "i-2": old}) == [
        "ami-1 is not current in any channel of dask: stable=ami-9",
    ]
    revoked = replace(old, revoked="a hole")
    assert warned(two, {"i-1": revoked, "i-2": revoked}) == ["ami-1 was revoked: a hole"]
    gone = Origin(instance_type="m6i.large", ami="ami-1")
    assert warned(two, {"i-1": gone, "i-2": gone}) == [
        "ami-1 was deregistered, or is no longer shared with this account",
    ]
    assert warned(two, {"i-1": origin()}) == ["instance i-2 can't be found in this account in eu-west-1"]


XEN = "not an EC2 instance, or one on Xen, such as t2 and m4, which have no id in their firmware"


def test_machines_without_an_id_are_not_passed_over() -> None:
    some = cluster(worker("a", instance="i-1"), worker("b", "two"), instance="i-0")
    known = {"i-0": origin(), "i-1": origin()}
    assert warned(some, known) == [f"the AMI of machine host-two is unknown: {XEN}"]
    none = cluster(worker("a"), worker("b", "two"))
    assert warned(none, {}) == [f"the AMIs of 3 machines are unknown: {XEN}"]
    assert warned(none) == []

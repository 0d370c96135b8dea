"""The machines of a cluster, and what should be the same on all of them. Pure; sizes are bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ami_builder.doctor.probe import NOT_OF_SCHEDULERS, PACKAGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ami_builder.core.records import Origin
    from ami_builder.doctor.rules import Cluster, Growth, Reading

# Dask's folder of all workers of a user, and that of one worker below it, in new and old versions.
_SCRATCH = ("/dask-scratch-space", "/dask-worker-space")

_MISSING = "none"
_NO_ID = "not an EC2 instance, or one on Xen, such as t2 and m4, which have no id in their firmware"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """Where the workers of a machine spill to."""

    folder: str
    system: str
    """Type of the file system."""
    size: int | None
    free: int | None
    bound: int | None
    """What the workers spill there at most, all together; None: no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that workers or the scheduler run on."""

    name: str
    """The EC2 instance's id, or else the name of the host."""
    boot: str
    host: str
    instance: str
    """The EC2 instance's id; empty elsewhere."""
    scheduler: bool
    workers: tuple[str, ...]
    """Addresses."""
    total: int | None
    available: int | None
    growth: Growth | None
    """Of its system; None if the machine says nothing of it."""
    spills: tuple[Spill, ...]
    versions: tuple[Mapping[str, str], ...]
    """Of its workers, and of the scheduler; each once."""
    origin: Origin | None


def machines(cluster: Cluster, origins: Mapping[str, Origin]) -> tuple[Machine, ...]:
    """Return the machines that could be read, the scheduler's first; `origins` are by instance id."""
    found: dict[str, dict[str, Reading]] = defaultdict(dict)
    scheduler = cluster.scheduler
    if scheduler.boot:
        found[scheduler.boot] = {}
    for worker in cluster.workers:
        if worker.reading is not None:
            found[worker.reading.boot][worker.address] = worker.reading
    return tuple(
        _machine(boot, here, cluster, origins)
        for boot, here in sorted(found.items(), key=lambda item: item[0] != scheduler.boot)
    )


def _machine(
    boot: str, readings: Mapping[str, Reading], cluster: Cluster, origins: Mapping[str, Origin]
) -> Machine:
    is_scheduler = cluster.scheduler.boot == boot
    all_of = list(readings.values())
    instances = [one.instance for one in all_of] + [cluster.scheduler.instance] * is_scheduler
    hosts = [one.host for one in all_of] + [cluster.scheduler.host] * is_scheduler
    versions = [dict(one.versions) for one in all_of] + [dict(cluster.scheduler.versions)] * is_scheduler
    instance, host = next(filter(None, instances), ""), next(filter(None, hosts), "")
    return Machine(
        name=instance or host or boot,
        boot=boot,
        host=host,
        instance=instance,
        scheduler=is_scheduler,
        workers=tuple(readings),
        total=min((one.total for one in all_of), default=None),
        available=min((one.available for one in all_of), default=None),
        growth=next((one.growth for one in all_of if one.growth is not None), None),
        spills=tuple(_spills(all_of)),
        versions=tuple(one for n, one in enumerate(versions) if one and one not in versions[:n]),
        origin=origins.get(instance),
    )


def _spills(readings: Iterable[Reading]) -> Iterator[Spill]:
    of: dict[tuple[str, str], list[Reading]] = defaultdict(list)
    for one in readings:
        folder = one.directory
        for scratch in _SCRATCH:
            folder = folder.partition(scratch)[0] or "/"
        of[folder, one.spill_system].append(one)
    for (folder, system), all_of in of.items():
        bounds = [one.max_spill for one in all_of]
        yield Spill(
            folder=folder,
            system=system,
            size=max((one.spill_size for one in all_of if one.spill_size is not None), default=None),
            free=min((one.spill_free for one in all_of if one.spill_free is not None), default=None),
            bound=None if None in bounds else sum(filter(None, bounds)),
        )


def warnings(cluster: Cluster, found: Sequence[Machine], region: str = "") -> tuple[str, ...]:
    """Return what differs in the cluster but should not; of AMIs in `region`, if they were asked for."""
    more = _of_amis(found, region) if region else ()
    return (*_of_the_scheduler(cluster), *_of_versions(cluster), *_of_spilling(found), *more)


def _of_the_scheduler(cluster: Cluster) -> Iterator[str]:
    if cluster.scheduler.problem:
        yield f"the scheduler's machine and versions can't be read: {cluster.scheduler.problem}"


def _of_versions(cluster: Cluster) -> Iterator[str]:
    """Warn of the packages that distributed's VersionMismatchWarning is about, but less often.

    A patch release of Python is no difference. The scheduler and this host are compared in what they have.
    """
    workers = [one for one in cluster.workers if one.reading is not None and one.reading.versions]
    alike: dict[str, list[str]] = defaultdict(list)
    for key in PACKAGES:
        who: dict[str, list[str]] = defaultdict(list)
        for worker in workers:
            assert worker.reading is not None
            who[_version(key, worker.reading.versions)].append(worker.name or worker.address)
        found_on = {version: _count(names, "worker") for version, names in who.items()}
        others = [("the scheduler", cluster.scheduler.versions), ("this host", cluster.here)]
        for name, versions in others[key in NOT_OF_SCHEDULERS :]:
            # This host need not have all that the workers have, nor the workers all that it has.
            if key in versions and found_on.keys() != {_MISSING}:
                version = _version(key, versions)
                found_on[version] = f"{found_on[version]}, {name}" if version in found_on else name
        if len(found_on) > 1:
            alike["; ".join(f"{version} on {names}" for version, names in sorted(found_on.items()))].append(
                key
            )
    for listed, keys in alike.items():
        yield f"{', '.join(keys)} differ{'s' if len(keys) == 1 else ''}: {listed}"


def _version(key: str, versions: Mapping[str, str]) -> str:
    found = versions.get(key, _MISSING)
    return ".".join(found.split(".")[:2]) if key == "python" else found


def _of_spilling(found: Sequence[Machine]) -> Iterator[str]:
    """Warn where workers together may spill more than fits."""
    full = [
        one.name
        for one in found
        for spill in one.spills
        if spill.bound is not None and spill.size is not None and spill.bound > spill.size
    ]
    if full:
        yield f"the workers of {_count(full, 'machine')} may spill more than their file system holds"


def _of_amis(found: Sequence[Machine], region: str) -> Iterator[str]:
    instances = [one for one in found if one.instance]
    if unknown := [one.name for one in found if not one.instance]:
        which = "the AMI of {} is" if len(unknown) == 1 else "the AMIs of {} are"
        yield f"{which.format(_count(unknown, 'machine'))} unknown: {_NO_ID}"
    if lost := [one.name for one in instances if one.origin is None]:
        yield f"{_count(lost, 'instance')} can't be found in this account in {region}"
    amis: dict[str, list[Machine]] = defaultdict(list)
    for one in instances:
        if one.origin is not None:
            amis[one.origin.ami].append(one)
    if len(amis) > 1:
        each = (f"{ami} on {_count([one.name for one in on], 'machine')}" for ami, on in sorted(amis.items()))
        yield f"the machines run different AMIs: {'; '.join(each)}"
    for ami, on in sorted(amis.items()):
        origin = on[0].origin
        assert origin is not None
        if origin.revoked is not None:
            yield f"{ami} was revoked: {origin.revoked}"
        elif not origin.name:
            yield f"{ami} was deregistered, or is no longer shared with this account"
        elif origin.others and not origin.channels:
            yield f"{ami} is not current in any channel of {origin.image}: {', '.join(origin.others)}"


def _count(names: Sequence[str], what: str) -> str:
    """Return one name, or how many there are."""
    return f"{what} {names[0]}" if len(names) == 1 else f"{len(names)} {what}s"

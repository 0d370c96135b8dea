"""The plan of what may go: nothing of a living run, no finished image, and nothing in doubt."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.cleanup import Action
from ami_builder.core.orphans import MARGIN, ORDER, FoundResource, Orphan, Resource, RunState, plan

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
LIFETIME = 7200.0
RUNS = {"live": RunState.LIVE, "ended": RunState.ENDED}


def found(kind: Resource = Resource.INSTANCE, run_id: str = "ended", **more: object) -> FoundResource:
    told = {"id": f"{kind}-1", "region": "eu-central-1", "created": NOW, **more}
    return FoundResource(kind=kind, run_id=run_id, **told)  # type: ignore[arg-type]


def decided(one: FoundResource, *others: FoundResource) -> Orphan:
    return next(left for left in plan([one, *others], RUNS, NOW, LIFETIME) if left.found == one)


@pytest.mark.parametrize("kind", Resource)
def test_what_an_ended_run_left_goes_and_a_living_ones_stays(kind: Resource) -> None:
    assert decided(found(kind)).action is Action.DELETE
    assert decided(found(kind)).reason == "run ended has ended"
    assert decided(found(kind, "live")).action is Action.KEEP


def test_another_machines_things_stay_until_they_are_too_old() -> None:
    allowed = timedelta(seconds=LIFETIME) + MARGIN
    assert decided(found(run_id="other", created=NOW - allowed)).action is Action.KEEP
    old = decided(found(run_id="other", created=NOW - allowed - timedelta(seconds=1)))
    assert old.action is Action.DELETE
    assert "3.0 h old" in old.reason
    assert decided(found(run_id="other", created=None)).action is Action.KEEP


def test_a_finished_image_stays_with_its_snapshots() -> None:
    image = found(Resource.IMAGE, id="ami-1", finished=True)
    snapshot = found(Resource.SNAPSHOT, images=("ami-1",))
    assert decided(image).action is Action.KEEP
    kept = decided(snapshot, image)
    assert kept.action is Action.KEEP
    assert kept.reason == "belongs to ami-1: a finished image"
    unfinished = found(Resource.IMAGE, id="ami-1")
    assert decided(unfinished).action is Action.DELETE
    assert decided(snapshot, unfinished).action is Action.DELETE
    assert decided(snapshot).action is Action.DELETE
    # As while an AMI is registered again under another name of its root device.
    shared = found(Resource.SNAPSHOT, images=("ami-2", "ami-1", "ami-3"))
    assert decided(shared, image, found(Resource.IMAGE, id="ami-2")).reason == kept.reason


def test_what_others_use_stays() -> None:
    kept = decided(found(Resource.SNAPSHOT, used_by="ami-theirs"))
    assert kept.action is Action.KEEP
    assert "ami-theirs" in kept.reason


things = st.builds(
    FoundResource,
    kind=st.sampled_from(Resource),
    id=st.integers(1, 6).map(lambda n: f"thing-{n}"),
    region=st.just("eu-central-1"),
    run_id=st.sampled_from(["live", "ended", "other", ""]),
    created=st.none() | st.integers(-100, 100_000).map(lambda s: NOW - timedelta(seconds=s)),
    finished=st.booleans(),
    images=st.lists(st.integers(1, 6).map(lambda n: f"thing-{n}"), max_size=2).map(tuple),
    used_by=st.sampled_from(["", "", "ami-theirs"]),
)


@given(st.lists(things, unique_by=lambda one: (one.kind, one.id)))
def test_whatever_is_found(several: list[FoundResource]) -> None:
    decisions = plan(several, RUNS, NOW, LIFETIME)
    assert sorted(map(repr, several)) == sorted(repr(left.found) for left in decisions)
    assert [ORDER.index(left.found.kind) for left in decisions] == sorted(
        ORDER.index(one.kind) for one in several
    )
    kept_images = {
        left.found.id
        for left in decisions
        if left.found.kind is Resource.IMAGE and left.action is Action.KEEP
    }
    for left in decisions:
        assert left.reason
        one = left.found
        if left.action is Action.DELETE:
            assert not one.finished
            assert not one.used_by
            assert one.run_id != "live"
            assert one.run_id == "ended" or (
                one.created is not None and NOW - one.created > timedelta(seconds=LIFETIME) + MARGIN
            )
            assert one.kind is not Resource.SNAPSHOT or kept_images.isdisjoint(one.images)
    assert plan(list(reversed(several)), RUNS, NOW, LIFETIME) == decisions

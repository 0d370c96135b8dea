"""The plan of which images go: whatever the world, nothing that is needed, young or in doubt."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.cleanup import Action, Candidate, Decision, Reference, RetentionPolicy, plan

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = RetentionPolicy(keep=0, young=30 * DAY, grace=timedelta(0), most=100)


def old(id: str = "ami-1", days: float = 100, **more: object) -> Candidate:
    return Candidate(id=id, image="dask", created=NOW - days * DAY, **more)  # type: ignore[arg-type]


def decided(*images: Candidate, policy: RetentionPolicy = POLICY, by: str = "") -> Decision:
    """Return what is decided about the first."""
    references = [Reference(id=images[0].id, by=by)] if by else []
    return next(d for d in plan(images, references, policy, NOW) if d.candidate == images[0])


def test_what_nothing_needs_goes() -> None:
    decision = decided(old())
    assert decision.action is Action.DELETE
    assert decision.reason == "100 days old, and nothing needs it"


@pytest.mark.parametrize(
    ("image", "by", "reason"),
    [
        (old(ours=False), "", "not ours"),
        (old(), "in channel stable", "in channel stable"),
        (old(), "used by instance i-1 (stopped)", "used by instance i-1 (stopped)"),
        (old(finished=False), "", "not finished: `ami-builder gc` handles it"),
        (old(protected="deregistration protection"), "", "deregistration protection"),
        (old(shared="shared with 123456789012"), "", "shared with 123456789012"),
        (old(days=29.9), "", "younger than 30 days"),
        (old(days=-1), "", "created in the future: a clock is wrong"),
        (replace(old(), created=None), "", "its age is unknown"),
        (old(days=1, revoked=True), "", "younger than 30 days"),
    ],
)
def test_what_stays_has_its_reason(image: Candidate, by: str, reason: str) -> None:
    decision = decided(image, by=by)
    assert (decision.action, decision.reason) == (Action.KEEP, reason)


def test_several_references_are_counted() -> None:
    references = [Reference(id="ami-1", by=f"used by instance i-{n}") for n in range(3)]
    (decision,) = plan([old()], references, POLICY, NOW)
    assert decision.reason == "used by instance i-0, and 2 more"


def test_the_newest_of_each_channel_stay() -> None:
    stable, testing = frozenset({"stable"}), frozenset({"stable", "testing"})
    images = [
        old("none-1", 110),
        old("none-2", 109),
        old("stable-1", 108, channels=stable),
        old("both", 107, channels=testing),
        old("stable-2", 106, channels=stable),
        old("stable-3", 105, channels=stable, revoked=True),
        old("theirs", 104, channels=stable, ours=False),
    ]
    decisions = {d.candidate.id: d for d in plan(images, [], replace(POLICY, keep=1), NOW)}
    assert {i for i, d in decisions.items() if d.action is Action.DELETE} == {
        "none-1",
        "stable-1",
        "stable-3",
    }
    assert decisions["both"].reason == "among the newest 1 of channel testing"
    assert decisions["stable-2"].reason == "among the newest 1 of channel stable"
    assert decisions["none-2"].reason == "among the newest 1 of those in no channel"
    assert decisions["stable-3"].reason == "revoked"


def test_an_image_is_deprecated_first_and_deleted_after_the_grace() -> None:
    policy = replace(POLICY, grace=7 * DAY)
    first = decided(old(), policy=policy)
    assert first.action is Action.DEPRECATE
    assert "it can be deleted 7 days from now" in first.reason
    waiting = decided(old(deprecated=NOW - 6 * DAY), policy=policy)
    assert waiting.action is Action.KEEP
    assert "deprecated, to be deleted from 2026-06-02" in waiting.reason
    assert decided(old(deprecated=NOW - 7 * DAY), policy=policy).action is Action.DELETE
    assert decided(old(deprecated=NOW + DAY), policy=policy).action is Action.KEEP


def test_one_run_deletes_the_oldest_up_to_its_cap() -> None:
    images = [old(f"ami-{n}", 200 - n) for n in range(5)]
    decisions = plan(images[::-1], [], replace(POLICY, most=2), NOW)
    assert [d.action for d in decisions] == [Action.DELETE] * 2 + [Action.KEEP] * 3
    assert [d.candidate for d in decisions] == images
    assert decisions[2].reason == "a later run deletes it: this one deletes 2 at most"


def test_while_there_is_room_nothing_goes() -> None:
    images = [old(f"ami-{n}", 200 - n, size=10) for n in range(4)]
    actions = [d.action for d in plan(images, [], replace(POLICY, size=25), NOW)]
    assert actions == [Action.DELETE, Action.DELETE, Action.KEEP, Action.KEEP]
    assert all(d.action is Action.KEEP for d in plan(images, [], replace(POLICY, size=40), NOW))
    # What is deprecated already counts as gone: the next run retires no more than the first.
    deprecated = [replace(images[0], deprecated=NOW), replace(images[1], deprecated=NOW), *images[2:]]
    policy = replace(POLICY, size=25, grace=7 * DAY)
    assert all(d.action is Action.KEEP for d in plan(deprecated, [], policy, NOW))


def test_images_deleted_in_use_by_other_cleaners_stay() -> None:
    """Known disasters: a stopped instance, an old template version, a parameter of somebody else's name."""
    for by in (
        "used by instance i-1 (stopped)",
        "used by launch template lt-1, version 3",
        "named by SSM parameter /team/their-own-name, version 12",
        "used by launch configuration workers-2019",
    ):
        assert decided(old(days=2000), by=by).action is Action.KEEP


ids = st.integers(1, 12).map(lambda n: f"ami-{n}")
moments = st.none() | st.integers(-5, 200).map(lambda days: NOW - days * DAY)
worlds = st.lists(
    st.builds(
        Candidate,
        id=ids,
        image=st.sampled_from(["dask", "other"]),
        created=moments,
        ours=st.booleans(),
        finished=st.booleans(),
        size=st.integers(0, 5),
        channels=st.frozensets(st.sampled_from(["stable", "testing"])),
        revoked=st.booleans(),
        shared=st.sampled_from(["", "", "shared"]),
        protected=st.sampled_from(["", "", "protected"]),
        deprecated=moments,
    ),
    unique_by=lambda one: one.id,
)
uses = st.lists(st.builds(Reference, id=ids, by=st.just("used")))
policies = st.builds(
    RetentionPolicy,
    keep=st.integers(0, 4),
    young=st.integers(0, 60).map(lambda n: n * DAY),
    grace=st.integers(0, 20).map(lambda n: n * DAY),
    most=st.integers(0, 12),
    size=st.sampled_from([0, 0, 5, 20]),
)


def gone(images: list[Candidate], references: list[Reference], policy: RetentionPolicy) -> set[str]:
    decisions = plan(images, references, policy, NOW)
    return {d.candidate.id for d in decisions if d.action is Action.DELETE}


@given(worlds, uses, policies)
def test_whatever_the_world(
    images: list[Candidate], references: list[Reference], policy: RetentionPolicy
) -> None:
    decisions = plan(images, references, policy, NOW)
    assert sorted(map(repr, images)) == sorted(repr(d.candidate) for d in decisions)
    assert all(d.reason for d in decisions)
    needed = {reference.id for reference in references}
    deleted = [d.candidate for d in decisions if d.action is Action.DELETE]
    assert len(deleted) <= policy.most
    for one in (d.candidate for d in decisions if d.action is not Action.KEEP):
        assert one.ours
        assert one.finished
        assert one.id not in needed
        assert not one.shared
        assert not one.protected
        assert one.created is not None
        assert NOW - one.created >= policy.young
    for one in deleted:
        assert not policy.grace or (one.deprecated is not None and NOW - one.deprecated >= policy.grace)
    counted = [one for one in images if one.ours and one.finished and not one.revoked]
    for image in ("dask", "other"):
        for channel in ("stable", "testing"):
            group = [one for one in counted if one.image == image and channel in one.channels]
            kept = [one for one in group if one not in deleted]
            assert len(kept) >= min(policy.keep, len(group))


@given(worlds, uses, uses, policies)
def test_more_care_never_deletes_more(
    images: list[Candidate], references: list[Reference], further: list[Reference], policy: RetentionPolicy
) -> None:
    loose = replace(policy, most=len(images), size=0)
    before = gone(images, references, loose)
    for careful in (
        replace(loose, keep=loose.keep + 1),
        replace(loose, young=loose.young + DAY),
        replace(loose, grace=loose.grace + DAY),
        replace(loose, size=7),
        replace(loose, most=2),
    ):
        assert gone(images, references, careful) <= before
    assert gone(images, references + further, loose) <= before


@given(worlds, uses, policies, st.randoms())
def test_the_order_of_the_world_does_not_matter(
    images: list[Candidate], references: list[Reference], policy: RetentionPolicy, random: object
) -> None:
    shuffled = list(images)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(images, references, policy, NOW) == plan(shuffled, references, policy, NOW)

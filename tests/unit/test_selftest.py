"""What a selftest records, compares and may spend: pure."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ami_builder.aws.tags import SELFTEST
from ami_builder.core.errors import ChecksFailed, UsageError
from ami_builder.selftest import compare, probes
from ami_builder.selftest.budget import Budget, Cost
from ami_builder.selftest.compare import Kind
from ami_builder.selftest.plan import Part, selftest_image
from ami_builder.selftest.recording import Behaviour, Recorder, Recording
from tests.sample_image import image

HOME = "us-east-1"


def behaviour(call: str = "ec2:CopyImage", step: str = "copy", **more: Any) -> Behaviour:
    return Behaviour(step=step, call=call, **{"outcomes": {"ok": 1}, **more})


def recording(*behaviours: Behaviour, **fields: tuple[str, ...]) -> Recording:
    named = {f"ec2:{name}": frozenset(found) for name, found in fields.items()}
    return Recording(behaviours=behaviours, fields=named)


def kinds(ours: Recording, theirs: Recording, unfinished: tuple[str, ...] = ()) -> list[Kind]:
    steps = [one for one in ("check", "copy") if one not in unfinished]
    found = compare.compare(ours, {"all": theirs}, steps, unfinished).differences
    return [one.kind for one in found]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([behaviour()], [behaviour()], []),
        ([behaviour()], [], [Kind.UNEXPECTED]),
        ([], [behaviour()], [Kind.NOT_CALLED]),
        ([behaviour(outcomes={"Weird": 1})], [behaviour()], [Kind.OUTCOME]),
        ([behaviour(outcomes={"ok": 2})], [behaviour()], [Kind.COUNT]),
        ([behaviour(facts={"the same": False})], [behaviour(facts={"the same": True})], [Kind.FACTS]),
        ([behaviour(retries=1)], [behaviour()], [Kind.RETRIED]),
        (
            [behaviour(states=("pending", "available"))],
            [behaviour(states=("available",))],
            [Kind.MORE_STATES],
        ),
        (
            [behaviour(states=("available", "pending"))],
            [behaviour(states=("pending", "available"))],
            [Kind.STATES],
        ),
        ([behaviour(states=("available",))], [behaviour(states=("pending", "available"))], [Kind.STATES]),
        (
            [behaviour("ec2:DescribeImages", outcomes={"ok": 60})],
            [behaviour("ec2:DescribeImages", outcomes={"ok": 6})],
            [Kind.POLLS],
        ),
        (
            [behaviour("ec2:DescribeImages", outcomes={"ok": 9})],
            [behaviour("ec2:DescribeImages", outcomes={"ok": 6})],
            [],
        ),
        (
            [behaviour("ec2:DescribeImages", outcomes={"InvalidAMIID.NotFound": 3, "ok": 6})],
            [behaviour("ec2:DescribeImages", outcomes={"ok": 6})],
            [Kind.LATE],
        ),
        ([], [behaviour("ec2:ModifyInstanceMetadataOptions")], [Kind.SOMETIMES]),
        ([behaviour("ec2:DescribeLaunchTemplateVersions")], [], [Kind.SOMETIMES]),
        ([behaviour("ec2:CopyImage elsewhere")], [behaviour()], [Kind.UNEXPECTED, Kind.NOT_CALLED]),
    ],
)
def test_each_kind_of_difference(
    ours: list[Behaviour], theirs: list[Behaviour], expected: list[Kind]
) -> None:
    assert sorted(kinds(recording(*ours), recording(*theirs))) == sorted(expected)


def test_fields_are_compared_over_all_steps() -> None:
    ours = recording(behaviour(), CopyImage=("ImageId: string", "New: string"))
    theirs = recording(behaviour(), CopyImage=("ImageId: string", "Old: string"))
    found = compare.compare(ours, {"all": theirs}, ["copy"]).fields
    assert {one.kind: (one.account, one.cloud) for one in found} == {
        Kind.MISSING: ("", "Old: string"),
        Kind.MORE_FIELDS: ("New: string", ""),
    }
    assert [one.kind for one in compare.compare(ours, {"all": theirs}, ["copy"]).matters] == [Kind.MISSING]


def test_a_step_that_was_not_done_is_not_compared() -> None:
    theirs = recording(behaviour(step="check"), behaviour(), behaviour("ec2:CreateTags"))
    assert kinds(recording(behaviour(step="check")), theirs, unfinished=("copy",)) == []
    ours = recording(behaviour(step="check"), behaviour(outcomes={"Weird": 1}))
    assert kinds(ours, theirs, unfinished=("copy",)) == [Kind.OUTCOME]


def test_without_a_copy_only_the_home_region_is_compared() -> None:
    ours = recording(behaviour(step="check"), behaviour("ec2:DescribeImages elsewhere", step="check"))
    theirs = recording(behaviour(step="check"), behaviour("ec2:CreateTags elsewhere", step="check"))
    assert compare.compare(ours, {"all": theirs}, ["check"]).differences == ()
    assert len(compare.compare(ours, {"all": theirs}, ["check", "copy"]).differences) == 2


@pytest.mark.parametrize(
    ("call", "step", "outcomes", "expected"),
    [
        ("DescribeImages elsewhere", Part.REVOKE, {"ok": 9, "UnauthorizedOperation": 7}, Kind.ELSEWHERE),
        (
            "DescribeImages elsewhere",
            Part.REVOKE,
            {"ok": 9, "no answer": 2, "AuthFailure": 1},
            Kind.ELSEWHERE,
        ),
        ("DescribeImages elsewhere", Part.REVOKE, {"UnauthorizedOperation": 16}, Kind.OUTCOME),
        ("DescribeImages elsewhere", Part.REVOKE, {"ok": 9, "Weird": 7}, Kind.OUTCOME),
        ("DescribeImages elsewhere", Part.COPY, {"ok": 9, "UnauthorizedOperation": 7}, Kind.OUTCOME),
        ("DescribeImages", Part.REVOKE, {"ok": 9, "UnauthorizedOperation": 7}, Kind.OUTCOME),
        ("CreateTags elsewhere", Part.REVOKE, {"ok": 1, "UnauthorizedOperation": 1}, Kind.OUTCOME),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_where_revoke_can_not_look_is_only_noted(
    call: str, step: Part, outcomes: dict[str, int], expected: Kind, *, whole: bool
) -> None:
    ours = recording(behaviour(f"ec2:{call}", step=step, outcomes=outcomes))
    theirs = recording(behaviour(f"ec2:{call}", step=step, outcomes={"ok": 16}))
    done = [one for one in (Part.COPY, Part.REVOKE) if whole or one is not step]
    (found,) = compare.compare(ours, {"all": theirs}, done, [] if whole else [step]).differences
    assert found.kind is expected
    assert found.kind.matters is (expected is Kind.OUTCOME)


def test_the_nearest_recording_counts() -> None:
    clouds = {
        "all": recording(behaviour()),
        "few": recording(behaviour(outcomes={"UnauthorizedOperation": 1})),
    }
    ours = recording(behaviour(outcomes={"UnauthorizedOperation": 1}))
    found = compare.compare(ours, clouds, ["copy"])
    assert (found.credentials, found.matters) == ("few", ())


def test_a_recording_is_read_as_it_was_written() -> None:
    one = recording(behaviour(states=("pending",), facts={"n": 1}), CopyImage=("ImageId: string",))
    text = compare.dump({"all": one})
    assert compare.load(text) == {"all": one}
    assert compare.dump(compare.load(text)) == text


def _recorded(parsed: dict[str, Any], action: str = "DescribeImages", **params: Any) -> Recording:
    """Return what is recorded of one call with a model whose answer has any fields."""
    import botocore.session

    model = botocore.session.get_session().get_service_model("ec2").operation_model(action)
    recorder, context = Recorder(HOME), {"client_region": HOME}
    handlers: dict[str, Any] = {}
    recorder.attach(SimpleNamespace(register=handlers.__setitem__))
    with recorder.step("look"):
        handlers["before-parameter-build"](params=params, context=context, model=model, event_name="x")
    answer = {"ResponseMetadata": {"RetryAttempts": 0}, **parsed}
    handlers["after-call"](parsed=answer, model=model, context=context, http_response=None, event_name="x")
    return recorder.recording()


def test_no_value_of_an_answer_is_recorded() -> None:
    secret = "ami-0123456789abcdef0"
    answer = {
        "Images": [
            {
                "ImageId": secret,
                "State": "available",
                "OwnerId": "123456789012",
                "Tags": [{"Key": "secret", "Value": "10.0.0.1"}],
            }
        ],
        "NotInTheModel": "secret",
    }
    found = _recorded(answer, ImageIds=[secret])
    (one,) = found.behaviours
    assert (one.call, dict(one.outcomes), one.states) == ("ec2:DescribeImages", {"ok": 1}, ("available",))
    assert found.fields["ec2:DescribeImages"] >= {"Images[].ImageId: string", "Images[].Tags[].Key: string"}
    text = compare.dump({"all": found})
    assert not any(word in text for word in (secret, "123456789012", "secret", "10.0.0.1", "NotInTheModel"))


@pytest.mark.parametrize("code", ["not a code", "Bad.ami-0123456789abcdef0", "x" * 300 + "-", "https://a"])
def test_an_odd_error_code_is_not_repeated(code: str) -> None:
    (one,) = _recorded({"Error": {"Code": code}}).behaviours
    assert dict(one.outcomes) == {"unreadable": 1}


def test_an_odd_state_or_fact_is_not_repeated() -> None:
    (one,) = _recorded({"Images": [{"State": "ami-0123456789abcdef0"}]}, ImageIds=["ami-1"]).behaviours
    assert one.states == ()
    recorder = Recorder(HOME)
    recorder.note("s", "c", {"a": "ami-0123456789abcdef0", "b": ["success", "i-1"], "c": 3, "d": True})
    assert json.dumps(recorder._facts["s", "c"]) == json.dumps(
        {"a": "hidden", "b": ["success", "hidden"], "c": 3, "d": True}
    )


def test_a_budget_counts_the_lifetime_before_and_the_time_after() -> None:
    budget, cost = Budget(spend=1.0), Cost(hourly=0.8, hours=1.0, fixed=0.1)
    budget.require("bake", cost)
    budget.settle(cost, 360)
    assert budget.spent == pytest.approx(0.18)
    with pytest.raises(ChecksFailed, match=r"bake can cost 0\.90"):
        budget.require("bake", cost)
    # A failed step may have left its instance running.
    budget.settle(cost, 360, failed=True)
    assert budget.spent == pytest.approx(1.08)
    with pytest.raises(UsageError, match=r"bake can cost 0\.90"):
        Budget(spend=0.5).require("bake", cost)


def test_its_image_is_short_lived_and_shared_with_nobody() -> None:
    plain = image()
    plain = replace(plain, aws=replace(plain.aws, spot=True, share_with=("123456789012",)))
    own = selftest_image(plain, "selftest-1a2b3c4d", None)
    assert not own.aws.spot
    assert (own.aws.share_with, own.aws.copy_to) == ((), ())
    assert max(own.bake.timeout, own.verify.timeout) < own.aws.lifetime < plain.aws.lifetime
    assert {one.key: one.value for one in own.aws.tags} == {SELFTEST: "selftest-1a2b3c4d"}


def test_probes_have_names_of_their_own_and_say_what_they_believe() -> None:
    every = [*probes.WITHOUT_AMI, *probes.WITH_AMI]
    assert len({one.name for one in every}) == len(every)
    assert all(one.belief.endswith(".") for one in every)


def test_an_answer_of_another_form_is_a_fact_and_no_error() -> None:
    from ami_builder.selftest.probing import Call, Probe, run

    class Answering:
        def client(self, name: str) -> Any:
            assert name == "ec2"
            return SimpleNamespace(describe_images=lambda **_: {"Nothing": 1})

    recorder = Recorder(HOME)
    call = Call(
        action="ec2:DescribeImages",
        facts={"images": "length(Images)", "late": "ends_with(Images[0].At, 'Z')"},
        keep={"image": "Images[0].ImageId"},
    )
    after = Call(action="ec2:DescribeImages", parameters={"ImageIds": ["{image}"]})
    probe = Probe(name="odd", belief="None.", calls=(call, after))
    kept: dict[str, str] = {}
    run(probe, Answering(), recorder, kept, {})  # type: ignore[arg-type]
    assert recorder._facts == {(probe.steps()[0], call.action): {"images": None, "late": None}}
    assert kept == {}
